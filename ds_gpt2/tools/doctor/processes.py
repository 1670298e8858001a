"""Check for other training processes on this machine: of this run, of other runs, left by earlier starts."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.lease import file_time
from ds_gpt2.common.locks import holder_of
from ds_gpt2.config import train_arguments
from ds_gpt2.config.run_location import CONFIG
from ds_gpt2.config.settings import PROJECT_DIR, Settings
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord, read_supervisor_record
from ds_gpt2.supervision.other_supervisor import how_to_end, how_to_proceed
from ds_gpt2.tools.doctor.finding import Finding

TRAIN = PROJECT_DIR / "ds_gpt2" / "train.py"

_FIX = "wait until they end, or stop them (they save first): `kill -TERM "


@dataclass(frozen=True)
class Rank:
    """A training process."""

    pid: int
    run: str  # name of its run
    run_dir: Path | None = None  # None if the settings on its command line cannot be read

    def trains(self, settings: Settings) -> bool:
        """Return whether this process trains the run with these settings: runs of one name may be elsewhere."""
        if self.run_dir is None:
            return self.run == settings.run.name
        return self.run_dir.resolve() == settings.run_dir.resolve()


def runs(settings: Settings, is_one_of_several: bool = False) -> list[Finding]:
    """Return the findings about this run and about other runs.

    Args:
        is_one_of_several: this machine is a host of a run on several; only the supervisor's knows whether an earlier
            supervisor is alive.
    """
    ranks = find_ranks()
    return [this_run(settings, ranks, is_one_of_several), other_runs(settings, ranks)]


def this_run(settings: Settings, ranks: list[Rank], is_one_of_several: bool = False) -> Finding:
    """Check that no other process trains this run.

    Ranks that a dead supervisor has left are only a warning: the next start stops them.

    Args:
        is_one_of_several: see ``runs``.
    """
    name = settings.run.name
    mine = [rank.pid for rank in ranks if rank.trains(settings)]
    supervised = None if is_one_of_several else read_supervisor_record(settings.run_dir)
    holder = holder_of(settings.checkpoint_dir / LOCK)
    if supervised is not None and supervised.is_alive(now := file_time(settings.run_dir)):
        return _supervised(settings, supervised, now)
    if mine and supervised is not None and supervised.group is not None:
        found = f"processes {_list(mine)} of {name} still run without a supervisor"
        return Finding("this run", "warn", found, "the next start makes them save and stops them")
    if mine:
        found = f"{name} is being trained by processes {_list(mine)}"  # of this machine, like those of ``kill``
        return Finding("this run", "fail", found, f"{_FIX}{_list(mine)}`")
    if holder:
        return Finding("this run", "fail", f"{name} is being trained by process {holder}", how_to_end(settings))
    return Finding("this run", "ok", f"no process trains {name}")


def _supervised(settings: Settings, record: SupervisorRecord, now: float) -> Finding:
    """Return the finding about a run that has a supervisor: whether another machine's runs is known by its lease."""
    is_known = record.is_here or record.renewed is not None
    found = f"{settings.run.name} is supervised by {record.describe(now)}"
    return Finding("this run", "fail" if is_known else "warn", found, how_to_proceed(settings, record, now))


def other_runs(settings: Settings, ranks: list[Rank]) -> Finding:
    """Check whether ranks of other runs of this project and user are on this machine."""
    others = [rank for rank in ranks if not rank.trains(settings)]
    if not others:
        return Finding("other runs", "ok", "no other run of this project")
    runs = ", ".join(sorted({str(rank.run_dir or rank.run) for rank in others}))
    pids = _list([rank.pid for rank in others])
    return Finding("other runs", "warn", f"processes {pids} train {runs}", f"{_FIX}{pids}`")


def find_ranks(script: Path = TRAIN) -> list[Rank]:
    """Return the ranks of this project's runs that belong to this user, by ascending process id."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command, cwd = process.cmdline(), Path(process.cwd())
            if process.uids().real == os.getuid() and (after := _after(script, command, cwd)) is not None:
                found.append(rank_of(process.pid, after, cwd))
    return sorted(found, key=lambda rank: rank.pid)


def rank_of(pid: int, arguments: list[str], cwd: Path) -> Rank:
    """Return the rank whose process ``pid`` was started in ``cwd`` with ``arguments``."""
    try:
        command = train_arguments.parse([word for word in arguments if word not in ("-h", "--help")])
    except UserError:
        return Rank(pid, "an unknown run")
    try:
        run_dir = command.settings(cwd).run_dir
        return Rank(pid, run_dir.name, run_dir)
    except UserError:  # changed or removed since the start
        return Rank(pid, command.overrides.get("run.name", _name_of(command.config)))


def _name_of(config: Path) -> str:
    """Return the default name of a run: a resume uses the config.yaml in the directory of the run."""
    return config.parent.name if config.name == CONFIG else config.stem


def _after(script: Path, command: list[str], cwd: Path) -> list[str] | None:
    """Return the arguments of ``script``, or None if ``command`` is not Python running it.

    Only the first words count: DeepSpeed's launcher has the script further back in its command line.
    """
    for position, word in enumerate(command[1:3], start=2):
        if word.endswith(script.name) and (cwd / word).resolve() == script.resolve():
            return command[position:]
    return None


def _list(pids: list[int]) -> str:
    return " ".join(str(pid) for pid in pids)
