"""Start real ranks with DeepSpeed's launcher, and see that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.supervision.launcher import TRAIN, RankLayout, start_command

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Launched:
    code: int
    output: str
    left_over: list[str]  # command lines of processes that outlived the launcher


Run = tuple[Launched, Path]  # a whole run and its directory


def launch(
    ranks: int, *arguments: str, script: Path = TRAIN, accelerator: str = "cpu", timeout: float = 900
) -> Launched:
    """SCRIPT ARGUMENTS on so many ranks, to its end."""
    return run(start_command(RankLayout(accelerator, ranks), script, arguments), accelerator, timeout)


def run(command: list[str], accelerator: str = "cpu", timeout: float = 900) -> Launched:
    """Run ``command`` in a session of its own; whatever it leaves behind is listed and ended."""
    process = start(command, accelerator)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output}") from None
    return Launched(process.returncode, output, end_session(process.pid))


def start(command: list[str], accelerator: str = "cpu") -> subprocess.Popen[str]:
    """Start ``command`` in a session of its own, its output in a pipe."""
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, "PYTHONUNBUFFERED": "1"}
    if not accelerator:  # as a person has it who never heard of the variable
        del environment["DS_ACCELERATOR"]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def end_session(session: int) -> list[str]:
    """Kill what is left of a session started here; returns the command lines of what was."""
    left = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                if command := process.cmdline():  # none: it is ending
                    left.append(" ".join(command))
                process.kill()
        except (psutil.Error, ProcessLookupError):
            continue
    return left
