"""Write the Python stacks of all ranks to files, to show where a run hangs."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from ds_gpt2.run_dir.heartbeat import read_beat, stacks_file
from ds_gpt2.supervision.rank_processes import members

_TIMEOUT_SECONDS = 10.0  # for the ranks to write their stacks
_POLL_SECONDS = 0.2


def write_stacks(run_dir: Path, ranks: Sequence[int], group: int, directory: Path) -> None:
    """Write a file for each rank of process group ``group``: the stacks of its threads and the state of its process.

    Ranks that are stopped (SIGSTOP) are resumed, because a stopped process cannot write its stacks.

    Raises:
        OSError: ``directory`` cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    processes = {process.pid: process for process in members(group)}
    beats = {rank: read_beat(run_dir, rank) for rank in ranks}
    found = {rank: processes[beat.pid] for rank, beat in beats.items() if beat is not None and beat.pid in processes}
    states = {rank: _state(process) for rank, process in found.items()}
    for process in found.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            _request_stacks(process)
            process.send_signal(signal.SIGCONT)
    _wait_until_written([stacks_file(run_dir, rank) for rank in found])
    for rank in found:
        target = directory / f"rank_{rank:05d}.txt"
        with contextlib.suppress(OSError):
            shutil.copyfile(stacks_file(run_dir, rank), target)
            with target.open("a", encoding="utf-8") as file:
                file.write(f"\n{beats[rank]}\n{states[rank]}\n")


def _wait_until_written(files: list[Path]) -> None:
    """Wait until every file has content and no size changes any more, at most ``_TIMEOUT_SECONDS``."""
    deadline, sizes = time.monotonic() + _TIMEOUT_SECONDS, [0] * len(files)
    while time.monotonic() < deadline:
        before, sizes = sizes, [_size(file) for file in files]
        if sizes == before and all(sizes):
            return
        time.sleep(_POLL_SECONDS)


def _request_stacks(process: psutil.Process) -> None:
    """Send SIGUSR2, on which a rank writes its stacks, to the main thread of ``process``.

    Any thread may handle a signal that is sent to a whole process. If another thread than the main one does and the
    process was stopped, the main thread continues before its stack is written. tgkill is used because Python cannot
    send a signal to one thread of another process (``signal.pthread_kill`` is for the calling process only; pidfds of
    threads need Linux 6.9).
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)  # since glibc 2.30
    if tgkill is None or tgkill(process.pid, process.pid, signal.SIGUSR2):
        process.send_signal(signal.SIGUSR2)


def _state(process: psutil.Process) -> str:
    """Return what the kernel reports about a process: its state, memory and the kernel function it waits in."""
    names = ("State:", "VmRSS:", "Threads:")
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        function = Path(f"/proc/{process.pid}/wchan").read_text(encoding="utf-8")
        return "\n".join([*(line for line in lines if line.startswith(names)), f"waits in: {function}"])
    return "exited"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
