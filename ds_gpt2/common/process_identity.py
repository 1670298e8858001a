"""Identify processes by their start time: process ids are reused, and the clock may be changed.

Seconds since 1970 are not reliable: the kernel counts ticks since boot, and the boot time is computed from the current
clock. If the clock is set, or a virtual machine resumes, the start times of all processes change.
"""

from __future__ import annotations

import functools
from pathlib import Path

import psutil

_TOLERANCE_SECONDS = 2.0  # of clocks, which are rounded


def start_of(pid: int) -> str | None:
    """Return the start time of process ``pid`` as an opaque text without blanks and hyphens.

    None if there is no such process, or if it is a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _start_by_clock(pid)
    state, ticks = fields[0], fields[19]  # proc(5), /proc/pid/stat: the third field and the 22nd
    return None if state in (b"Z", b"X") else f"{int(ticks)}.{_boot()}"


def is_running(pid: int, start: str) -> bool:
    """Return whether the process ``pid`` with start time ``start``, see ``start_of``, exists and is not a zombie."""
    return start_of(pid) == start


def was_running_by_clock(pid: int, time: float) -> bool:
    """Return whether the process ``pid`` exists, is not a zombie, and had started by ``time``, in seconds since 1970.

    For records of earlier versions, which have no start time.
    """
    try:
        process = psutil.Process(pid)
        return process.create_time() < time + _TOLERANCE_SECONDS and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@functools.cache
def _boot() -> str:
    """Return the identifier of the current boot of the machine; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    except OSError:  # some containers do not provide it
        return ""


def _start_by_clock(pid: int) -> str | None:
    """Return the start time from psutil: other systems than Linux record it when the process starts."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return None
