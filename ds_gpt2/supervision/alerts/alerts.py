"""Send alerts about the events of a run.

The supervisor calls ``send_news`` twice per second, ``status --alert`` calls ``send``. Neither raises, because alerts
must not end a run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as StillTrying
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import AlertSettings
from ds_gpt2.run_dir.journal import JOURNAL, Event, parse_event
from ds_gpt2.supervision.alerts import channels
from ds_gpt2.supervision.alerts.channels import LIMIT_SECONDS, Channel
from ds_gpt2.supervision.alerts.delivery_queue import DeliveryQueue
from ds_gpt2.supervision.alerts.message import Message, from_events, with_note
from ds_gpt2.supervision.alerts.rate_limit import HourlyLimit

COUNT = "alerts.json"  # in the run's directory

log = logging.getLogger(__name__)


class Alerts:
    """The alerts of one run, about events from now on: those already in its journal are not sent."""

    def __init__(self, settings: AlertSettings, run_dir: Path) -> None:
        """
        Args:
            run_dir: exists; its name is the run's.
        """
        self._settings = settings
        self._kinds = frozenset(settings.kinds) - {"alert"}  # a message about each message would never end
        self._opened = OpenDirectory(run_dir)
        self._read = self._size()  # bytes of the journal
        self._limit = HourlyLimit(run_dir / COUNT, settings.per_hour)
        self._queue = DeliveryQueue(self._channels, run_dir)
        self._sent_directly: set[tuple[float, str]] = set()  # (time, kind) of events not read from the journal
        self._addresses: list[channels.Address] = []  # as last read
        self._address_problem = ""
        self._channels()
        self._last_warning = ""

    def send_news(self) -> None:
        """Queue one message about the journal's events since the last call; does not wait."""
        try:
            news = [event for event in self._news() if (event.time, event.kind) not in self._sent_directly]
            events = [event for event in news if event.kind in self._kinds]
            if events:
                self._post_events(events)
            elif self._limit.can_send_withheld(time.time()):
                self._post_withheld()
        except Exception as error:
            self._warn_once(f"alerts: the journal cannot be read ({type(error).__name__})")

    def send_event(self, event: Event) -> None:
        """Queue a message about an event that cannot be written to the journal; does not wait."""
        self._sent_directly.add((event.time, event.kind))
        try:
            if event.kind in self._kinds:
                self._post_events([event])
        except Exception as error:  # its text may contain an address
            log.warning(f"alerts: {type(error).__name__} while sending a message")

    def send(self, kind: str, title: str, text: str) -> bool:
        """Send one message and wait until it is delivered, about 30 seconds at most.

        Args:
            title: one line, with the run's name in it.

        Returns:
            Whether at least one channel accepted it; False if there is no channel, or the hourly limit is reached.
        """
        try:
            return self._send(kind, title, text)
        except Exception as error:
            log.warning(f"alerts: {type(error).__name__} while sending a message")
            return False

    def close(self) -> None:
        """Wait until each pending message was attempted once more, about 30 seconds at most."""
        self._queue.close()

    @property
    def _run_dir(self) -> Path:
        return self._opened.path

    @property
    def _journal(self) -> Path:
        return self._run_dir / JOURNAL

    def _warn_once(self, text: str) -> None:
        """Log ``text`` unless it is the same as the last time."""
        if text != self._last_warning:
            self._last_warning = text
            log.warning(text)

    def _send(self, kind: str, title: str, text: str) -> bool:
        if not self._channels() or (withheld := self._limit.admit([kind], time.time())) is None:
            return False
        message = with_note(self._message(kind, title, text), withheld)
        try:
            return self._queue.post(message).result(LIMIT_SECONDS + 5)
        except StillTrying:
            return False

    def _post_events(self, events: Sequence[Event]) -> None:
        if not self._channels():
            return
        withheld = self._limit.admit([event.kind for event in events], time.time())
        if withheld is not None:
            self._queue.post(with_note(from_events(self._run_dir, events), withheld))

    def _post_withheld(self) -> None:
        withheld = self._limit.admit([], time.time())
        if withheld:
            self._queue.post(self._message("alert", f"{self._run_dir.name}: over the hourly limit", withheld))

    def _message(self, kind: str, title: str, text: str) -> Message:
        return Message(self._run_dir.name, kind, title, text, time.time())

    def _channels(self) -> list[Channel]:
        """Return the channels; while the file of addresses cannot be used, which is logged once, as it was before."""
        problem = ""
        try:
            self._addresses = channels.addresses(self._settings)
        except UserError as error:
            problem = str(error)
        if problem and problem != self._address_problem:
            log.warning(f"alerts: {problem}")
        self._address_problem = problem
        return [*channels.commands(self._settings), *self._addresses]

    def _news(self) -> list[Event]:
        """Return the events since the last call; an incomplete last line is left for the next call."""
        size = self._size()
        if size == self._read:
            return []
        with open(self._journal, "rb", opener=regular_only) as file:
            file.seek(self._read if self._read < size else 0)  # a shorter file is a new journal
            start = file.tell()
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._read = start + len(complete)
        return [event for line in complete.splitlines() if (event := parse_event(line)) is not None]

    def _size(self) -> int:
        try:
            return self._journal.stat().st_size
        except OSError:
            return 0
