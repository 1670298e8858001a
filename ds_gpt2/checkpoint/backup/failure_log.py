"""Report to the run's journal that backups fail, and that they work again."""

from __future__ import annotations

import threading
import time

from ds_gpt2.common.formatting import duration
from ds_gpt2.run_dir.journal import Event, Journal

_REMIND_SECONDS = 86_400.0  # a failure that lasts is reported once a day


class BackupReporter:
    """What the journal says about backups. Only a change is reported, also over restarts of the run."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._last = _newest(journal)

    def failed(self, text: str, step: int | None = None) -> None:
        """A copy was not made. ``text`` says which one and why, in one line without secrets."""
        with self._lock:
            since = failing_since(self._last)
            if self._last is not None and since is not None and time.time() - self._last.time < _REMIND_SECONDS:
                return
            since = time.time() if since is None else since
            self._journal.write("backup_failed", text, step, since=since)
            self._last = Event(time.time(), "backup_failed", text, step, {"since": since})

    def recovered(self, text: str, step: int | None = None) -> None:
        """A copy was made. ``text`` says which one, and where it is."""
        with self._lock:
            if (since := failing_since(self._last)) is None:
                return
            text = f"backups work again after {duration(max(0.0, time.time() - since))}: {text}"
            self._journal.write("backup_ok", text, step)
            self._last = Event(time.time(), "backup_ok", text, step)


def failing_since(event: Event | None) -> float | None:
    """Since when backups fail, by their newest event, in seconds since 1970; None if they do not fail."""
    if event is None or event.kind != "backup_failed":
        return None
    return event.time_in("since")


def _newest(journal: Journal) -> Event | None:
    return next(
        (event for event in reversed(list(journal.read())) if event.kind in ("backup_failed", "backup_ok")), None
    )
