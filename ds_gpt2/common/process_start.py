"""When a process began, as text that identifies it: numbers of processes come again, and the clock may be set.

Seconds since 1970 would not do: the kernel counts in ticks since the machine booted, and when that was is computed from
the clock of now. So a clock that is set, or a virtual machine that resumes, moves the start of every process.
"""

from __future__ import annotations

import functools
from pathlib import Path

import psutil


def start_of(pid: int) -> str | None:
    """When process ``pid`` began, without blanks and hyphens; None if there is no such process, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _start_by_clock(pid)
    state, ticks = fields[0], fields[19]  # proc(5), /proc/pid/stat: the third field and the 22nd
    return None if state in (b"Z", b"X") else f"{int(ticks)}.{_boot()}"


def is_running(pid: int, start: str) -> bool:
    """Whether the process ``pid`` that began at ``start``, as ``start_of`` gave it, is there and no zombie."""
    return start_of(pid) == start


@functools.cache
def _boot() -> str:
    """What tells this boot of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    except OSError:  # not in every container
        return ""


def _start_by_clock(pid: int) -> str | None:
    """Elsewhere than on Linux the start is recorded when it happens."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return None
