"""Who else trains here: this run itself, other runs, what earlier ones have left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.common.files import regular_only
from ds_gpt2.config.settings import PROJECT_DIR, Settings
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.tools.doctor.row import Finding

TRAIN = PROJECT_DIR / "ds_gpt2" / "train.py"

_FIX = "wait for their end, or end them (they save first): `kill -TERM "


@dataclass(frozen=True)
class Rank:
    """A process that trains."""

    pid: int
    run: str  # its name, as far as its command line tells


def runs(settings: Settings) -> list[Finding]:
    """Who trains this run, and who trains others."""
    ranks = find_ranks()
    return [this_run(settings, ranks), other_runs(settings, ranks)]


def this_run(settings: Settings, ranks: list[Rank]) -> Finding:
    """Two must not train one run; what a dead supervisor has left of it, the next start ends."""
    name = settings.run.name
    mine = [rank.pid for rank in ranks if rank.run == name]
    supervised = read_supervisor_record(settings.run_dir)
    holder = _holder(settings.checkpoint_dir / LOCK)
    if supervised is not None and supervised.is_alive:
        found = f"{name} is kept going by process {supervised.pid} on {supervised.host}"
        here = supervised.host == socket.gethostname()
        return Finding("this run", "fail" if here else "warn", found, "wait for its end, or give another run.name")
    if mine and supervised is not None and supervised.group is not None:
        found = f"processes {_list(mine)} of {name} outlived their supervisor"
        return Finding("this run", "warn", found, "the next start asks them to save, and ends them")
    if mine or holder:
        found = f"{name} is being trained by process {holder or _list(mine)}"
        return Finding("this run", "fail", found, f"{_FIX}{_list(mine)}`" if mine else "wait for its end")
    return Finding("this run", "ok", f"nobody trains {name}")


def other_runs(settings: Settings, ranks: list[Rank]) -> Finding:
    """Other runs of this project and user share the machine, or were forgotten."""
    others = [rank for rank in ranks if rank.run != settings.run.name]
    if not others:
        return Finding("other runs", "ok", "no other run of this project")
    runs = ", ".join(sorted({rank.run for rank in others}))
    pids = _list([rank.pid for rank in others])
    return Finding("other runs", "warn", f"processes {pids} train {runs}", f"{_FIX}{pids}`")


def find_ranks(script: Path = TRAIN) -> list[Rank]:
    """The ranks of this project's runs that belong to this user."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if process.uids().real == os.getuid() and _runs(script, process, command):
                found.append(Rank(process.pid, run_of(command)))
    return sorted(found, key=lambda rank: rank.pid)


def run_of(command: list[str]) -> str:
    """The run's name: what a setting or flag says, else the name of its file."""
    name = ""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word.startswith("run.name="):
            return word.removeprefix("run.name=")
        if word == "--run_name":
            return following
        if word == "--config":
            file = Path(following)
            name = file.parent.name if file.name == "config.yaml" else file.stem  # a resume's is in the run's directory
    return name or "an unknown run"


def _runs(script: Path, process: psutil.Process, command: list[str]) -> bool:
    """Whether it is Python with ``script``: DeepSpeed's launcher has that among its arguments, further back."""
    words = [word for word in command[1:3] if word.endswith(script.name)]
    return any((Path(process.cwd()) / word).resolve() == script.resolve() for word in words)


def _holder(lock: Path) -> str | None:
    """Who holds the run's lock, as that says itself; None if nobody does. Nothing is written."""
    try:
        with open(lock, "rb", opener=regular_only) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(100).decode(errors="replace").strip() or "unknown"
    except OSError:
        return None  # no lock yet, or a file system without
    return None


def _list(pids: list[int]) -> str:
    return " ".join(str(pid) for pid in pids)
