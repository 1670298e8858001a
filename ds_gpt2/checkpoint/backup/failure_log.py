"""Record in the run's journal that backups fail, and when they work again."""

from __future__ import annotations

import threading
import time

from ds_gpt2.common.formatting import DAY, duration
from ds_gpt2.run_dir.journal import Event, Journal

_REMIND_SECONDS = DAY  # a continuing failure is recorded once a day


class BackupReporter:
    """Records failures of backups and recoveries. Only changes are recorded, also across restarts of the run."""

    def __init__(self, journal: Journal) -> None:
        """Read the newest event about backups from the journal."""
        self._journal = journal
        self._lock = threading.Lock()
        self._last = _newest(journal)

    def failed(self, text: str, step: int | None = None) -> None:
        """Record that a backup failed.

        Args:
            text: which backup and why, in one line without secrets.
        """
        with self._lock:
            since = failing_since(self._last)
            if self._last is not None and since is not None and time.time() - self._last.time < _REMIND_SECONDS:
                return
            since = time.time() if since is None else since
            self._journal.write("backup_failed", text, step, since=since)
            self._last = Event(time.time(), "backup_failed", text, step, {"since": since})

    def recovered(self, text: str, step: int | None = None) -> None:
        """Record that a backup succeeded, if the one before failed.

        Args:
            text: which backup, and its address, in one line without secrets.
        """
        with self._lock:
            if (since := failing_since(self._last)) is None:
                return
            text = f"backups work again after {duration(max(0.0, time.time() - since))}: {text}"
            self._journal.write("backup_ok", text, step)
            self._last = Event(time.time(), "backup_ok", text, step)


def failing_since(event: Event | None) -> float | None:
    """Return the time since which backups fail, in seconds since 1970; None if they do not fail.

    Args:
        event: the newest event of the kinds ``backup_failed`` and ``backup_ok``; None if there is none.
    """
    if event is None or event.kind != "backup_failed":
        return None
    return event.time_in("since")


def _newest(journal: Journal) -> Event | None:
    return next(
        (event for event in reversed(list(journal.read())) if event.kind in ("backup_failed", "backup_ok")), None
    )
