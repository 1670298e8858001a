"""Check that the system clock is right. The order of checkpoints and the times in curves and journals depend on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ds_gpt2.common.formatting import clock, duration
from ds_gpt2.tools.doctor.finding import Finding
from ds_gpt2.tools.doctor.program_output import output_of

_FIX = "`sudo timedatectl set-ntp true`, or install chrony; the host may synchronize the clock of a virtual machine"
_UNKNOWN_FIX = "run `timedatectl` on the host: a container has the host's clock"
_TIMEOUT = 2.0  # seconds
_TOLERANCE = 600.0  # seconds by which a file may be newer than the clock
# The last of the comma-separated values that `chronyc -c tracking` prints, and whether the clock is synchronized.
_LEAP_STATUS = {"Normal": True, "Insert second": True, "Delete second": True, "Not synchronised": False}


def synchronized() -> Finding:
    """Check that the clock is synchronized (NTP). Starts two programs, which may take seconds to answer.

    systemd answers for every NTP client that sets the kernel's synchronization flag. chronyd sets that flag only with
    ``rtcsync`` in its configuration, so chronyd is also queried. In most containers neither is available.
    """
    answers = {"systemd": _synchronized_by_systemd(), "chronyd": _synchronized_by_chronyd()}
    if True in answers.values():
        source = next(name for name, answer in answers.items() if answer)
        return Finding("clock", "ok", f"synchronized (NTP), according to {source}")
    if False in answers.values():
        return Finding("clock", "warn", "not synchronized (NTP)", _FIX)
    return Finding("clock", "unknown", "neither timedatectl nor chronyc is available here", _UNKNOWN_FIX)


def not_behind(files: Iterable[Path], now: float) -> Finding:
    """Check that no existing file of ``files`` is newer than the clock.

    Args:
        now: the clock, in seconds since 1970.
    """
    times = {file: file.stat().st_mtime for file in files if file.exists()}
    newest = max(times, key=lambda file: times[file])
    behind = times[newest] - now
    if behind > _TOLERANCE:
        found = f"the clock shows {clock(now)}, but {newest} was modified {duration(behind)} later"
        return Finding("time", "warn", found, _FIX)
    return Finding("time", "ok", f"{clock(now)}, later than all files of the project and the run")


def _synchronized_by_systemd() -> bool | None:
    """Return whether ``timedatectl`` reports a synchronized clock; None if systemd does not answer."""
    answer = output_of("timedatectl", "show", "--property=NTPSynchronized", "--value", timeout=_TIMEOUT)
    return {"yes": True, "no": False}.get((answer or "").strip())


def _synchronized_by_chronyd() -> bool | None:
    """Return whether ``chronyc`` reports a synchronized clock; None if chronyd does not answer."""
    answer = output_of("chronyc", "-c", "tracking", timeout=_TIMEOUT)
    return _LEAP_STATUS.get((answer or "").strip().rpartition(",")[2])
