"""Start real ranks with DeepSpeed's launcher, and end all processes that they leave behind."""

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
    """How a command ended."""

    code: int
    output: str
    left_over: list[str]  # command lines of processes that outlived the launcher


Run = tuple[Launched, Path]  # a complete run and its directory


def launch(
    ranks: int, *arguments: str, script: Path = TRAIN, accelerator: str = "cpu", timeout: float = 900
) -> Launched:
    """Run ``script`` with ``arguments`` on ``ranks`` ranks until it ends."""
    return run(start_command(RankLayout(accelerator, ranks), script, arguments), accelerator, timeout)


def run(command: list[str], accelerator: str = "cpu", timeout: float = 900) -> Launched:
    """Run ``command`` in a session of its own; list and kill the processes that it leaves behind."""
    process = start(command, accelerator)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"timed out after {timeout} s:\n{output}") from None
    return Launched(process.returncode, output, end_session(process.pid))


def start(command: list[str], accelerator: str = "cpu") -> subprocess.Popen[str]:
    """Start ``command`` in a session of its own, its output in a pipe."""
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, "PYTHONUNBUFFERED": "1"}
    if not accelerator:  # as in an environment that does not set the variable
        del environment["DS_ACCELERATOR"]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def end_session(session: int) -> list[str]:
    """Kill the processes of a session that ``start`` has made; return their command lines."""
    left = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                if command := process.cmdline():  # empty while a process exits
                    left.append(" ".join(command))
                process.kill()
        except (psutil.Error, ProcessLookupError):
            continue
    return left
