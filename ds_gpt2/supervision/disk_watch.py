"""Will the disk of the checkpoints last, and does that of the run's directory take files? Checked at intervals."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable

from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.space import bytes_for_next_save
from ds_gpt2.common.files import write_problem
from ds_gpt2.common.formatting import duration, size
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import Settings

_EVERY_SECONDS = 600.0
_PROBE_SECONDS = 20.0
_NOT_WRITABLE_SECONDS = 120.0  # a shorter outage of a server is not reported
_DAY = 86_400.0
_REMEMBERED = 288  # looks: two days
_ENOUGH_SECONDS = 4 * 3600.0  # a shorter trend says nothing: checkpoints come and go


class DiskWatch:
    """The disk of a run's checkpoints. Each time that it becomes short is told once."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """
        Args:
            clock: seconds.
            free_bytes: of the disk; default: as the system says.
        """
        self._settings = settings
        self._clock = clock
        self._free_bytes = free_bytes or (lambda: shutil.disk_usage(settings.checkpoint_dir).free)
        self._next = clock()
        self._seen: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)
        self._short = False

    def look(self) -> str | None:
        """What to tell, if anything; most calls do nothing at all."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _EVERY_SECONDS
        try:
            self._seen.append((now, self._free_bytes()))
        except OSError:
            return None
        was_short, warning = self._short, self._warning()
        self._short = warning is not None
        return None if was_short else warning

    def _warning(self) -> str | None:
        free, needed = self._seen[-1][1], self._needed()
        where = self._settings.checkpoint_dir
        if free < needed:
            return f"{where} has {size(free)} free, the next checkpoint needs {size(needed)}: make room"
        days = self._days_left(free - needed)
        if days is not None and days < self._settings.alerts.disk_days:
            return f"{where} has {size(free)} free, which lasts {days:.1f} days at the present rate: make room"
        return None

    def _needed(self) -> int:
        newest = next((found.manifest.bytes for found in scan(self._settings.checkpoint_dir) if found.manifest), 0)
        return bytes_for_next_save(newest, self._settings.checkpoint)

    def _days_left(self, spare: int) -> float | None:
        (begun, before), (now, free) = self._seen[0], self._seen[-1]
        if now - begun < _ENOUGH_SECONDS or free >= before:
            return None
        return spare / ((before - free) / (now - begun)) / _DAY


class WriteWatch:
    """The run's directory: a run that cannot write there trains, but is not logged. Each outage is reported once."""

    def __init__(self, directory: OpenDirectory, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: seconds.
        """
        self._directory = directory
        self._clock = clock
        self._next = clock()
        self._since: float | None = None  # seconds of ``clock``
        self._is_reported = False

    def look(self) -> str | None:
        """What to report, if anything; most calls do nothing at all."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _PROBE_SECONDS
        problem = write_problem(self._directory.path)
        if problem is None:
            self._since, self._is_reported = None, False
            return None
        self._since = now if self._since is None else self._since
        if self._is_reported or now - self._since < _NOT_WRITABLE_SECONDS:
            return None
        self._is_reported = True
        lasted = duration(now - self._since)
        return f"{self._directory.path} cannot be written for {lasted} ({problem}): the run is not logged meanwhile"
