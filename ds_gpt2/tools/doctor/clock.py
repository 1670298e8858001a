"""Is this machine's clock right? Checkpoints, curves and the newest run go by it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from ds_gpt2.common.formatting import clock, duration
from ds_gpt2.tools.doctor.row import Finding

_FIX = "`sudo timedatectl set-ntp true`, or install chrony; a virtual machine may be kept right by its host"
_TOLERATED = 600.0  # seconds that a file may be from the future
_UNSYNCHRONISED = 0x40  # STA_UNSYNC of linux/timex.h


class _Timex(ctypes.Structure):
    """The beginning of ``struct timex`` of linux/timex.h, and room for the rest."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("largest_error", ctypes.c_long),  # microseconds
        ("estimated_error", ctypes.c_long),  # microseconds
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    ]


def synchronised() -> Finding:
    """Whether the clock is synchronised, by the kernel (adjtimex, which needs no privileges)."""
    state = _Timex(modes=0)
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if state.status & _UNSYNCHRONISED:
        return Finding("clock", "warn", "not synchronised (NTP)", _FIX)
    return Finding("clock", "ok", f"synchronised, wrong by {state.largest_error / 1e3:,.0f} ms at most")


def not_behind(files: Iterable[Path], now: float) -> Finding:
    """Nothing here can be newer than now.

    Args:
        now: seconds since 1970.
    """
    times = {file: file.stat().st_mtime for file in files if file.exists()}
    newest = max(times, key=lambda file: times[file])
    behind = times[newest] - now
    if behind > _TOLERATED:
        return Finding("time", "warn", f"{clock(now)}, but {newest} is from {duration(behind)} later", _FIX)
    return Finding("time", "ok", f"{clock(now)}, after all that the project and the run have written")
