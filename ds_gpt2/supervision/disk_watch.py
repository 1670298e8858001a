"""Check at intervals whether the disk of the checkpoints is filling up, and whether the run's directory is writable."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable

from ds_gpt2.checkpoint.space import bytes_for_next_save, newest_full_bytes
from ds_gpt2.common.files import write_problem
from ds_gpt2.common.formatting import DAY, HOUR, duration, size
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import Settings

_SPACE_INTERVAL_SECONDS = 600.0
_WRITE_INTERVAL_SECONDS = 20.0
_NOT_WRITABLE_SECONDS = 120.0  # a shorter outage of a server is not reported
_SAMPLES = 288  # two days
_SHORTEST_TREND_SECONDS = 4 * HOUR  # within less time, saves and deletions of checkpoints hide the trend


class DiskWatch:
    """Watches the disk of a run's checkpoints. Each shortage of space is reported once."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """
        Args:
            clock: seconds.
            free_bytes: of the disk; default: from the system.
        """
        self._settings = settings
        self._clock = clock
        self._free_bytes = free_bytes or (lambda: shutil.disk_usage(settings.checkpoint_dir).free)
        self._next = clock()
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)
        self._is_short = False

    def check(self) -> str | None:
        """Return a warning; None if there is no new one or the next check is not due."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _SPACE_INTERVAL_SECONDS
        try:
            self._samples.append((now, self._free_bytes()))
            warning = self._warning()
        except OSError:
            return None
        was_short = self._is_short
        self._is_short = warning is not None
        return None if was_short else warning

    def _warning(self) -> str | None:
        free, needed = self._samples[-1][1], self._needed()
        directory = self._settings.checkpoint_dir
        if free < needed:
            return f"{directory} has {size(free)} free, the next checkpoint needs {size(needed)}: free some space"
        days = self._days_left(free - needed)
        if days is not None and days < self._settings.alerts.disk_days:
            return f"{directory} has {size(free)} free, enough for {days:.1f} days at the current rate: free some space"
        return None

    def _needed(self) -> int:
        newest = newest_full_bytes(self._settings.checkpoint_dir) or 0
        return bytes_for_next_save(newest, self._settings.checkpoint)

    def _days_left(self, spare: int) -> float | None:
        (start, before), (now, free) = self._samples[0], self._samples[-1]
        if now - start < _SHORTEST_TREND_SECONDS or free >= before:
            return None
        return spare / ((before - free) / (now - start)) / DAY


class WriteWatch:
    """Watches the run's directory: without it the run trains, but is not logged. Each outage is reported once."""

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

    def check(self) -> str | None:
        """Return a warning; None if there is no new one or the next check is not due."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _WRITE_INTERVAL_SECONDS
        problem = write_problem(self._directory.path)
        if problem is None:
            self._since, self._is_reported = None, False
            return None
        self._since = now if self._since is None else self._since
        if self._is_reported or now - self._since < _NOT_WRITABLE_SECONDS:
            return None
        self._is_reported = True
        outage = duration(now - self._since)
        return f"{self._directory.path} has not been writable for {outage} ({problem}): the run trains without logs"
