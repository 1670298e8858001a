"""Tell a person who is elsewhere what befalls the run.

The supervisor calls ``tell_news`` all the time, a check that cron makes calls ``send``. Neither ever raises: a run is
worth more than its messages.
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
from ds_gpt2.supervision.alerts.delivery_queue import Courier
from ds_gpt2.supervision.alerts.message import Message, of_events, with_note
from ds_gpt2.supervision.alerts.rate_limit import HourlyLimit

COUNT = "alerts.json"  # in the run's directory

log = logging.getLogger(__name__)


class Alerts:
    """One run's, from now on: what is in its journal already is not told."""

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
        self._courier = Courier(self._ways, run_dir)
        self._told: set[tuple[float, str]] = set()  # (time, kind) of the events that went by without the journal
        self._complaint = ""
        self._warned = ""

    def check(self) -> None:
        """
        Raises:
            UserError: the file of addresses cannot be used, apprise is missing, or knows no such address.
        """
        channels.check(self._settings)

    def tell_news(self) -> None:
        """Send what the journal says since the last call, as one message; returns at once."""
        try:
            news = [event for event in self._news() if (event.time, event.kind) not in self._told]
            events = [event for event in news if event.kind in self._kinds]
            if events:
                self._post_events(events)
            elif self._limit.holds_and_has_room(time.time()):
                self._post_held_back()
        except Exception as error:
            self._warn_once(f"alerts: the journal cannot be read ({type(error).__name__})")

    def tell(self, event: Event) -> None:
        """Send an event that cannot be written to the journal; returns at once."""
        self._told.add((event.time, event.kind))
        try:
            if event.kind in self._kinds:
                self._post_events([event])
        except Exception as error:  # its text may hold an address
            log.warning(f"alerts: {type(error).__name__} while a message was sent")

    @property
    def _run_dir(self) -> Path:
        return self._opened.path

    @property
    def _journal(self) -> Path:
        return self._run_dir / JOURNAL

    def _warn_once(self, text: str) -> None:
        """Log ``text`` unless it was the last that was logged."""
        if text != self._warned:
            self._warned = text
            log.warning(text)

    def send(self, kind: str, title: str, text: str) -> bool:
        """Send one message now and wait until it is taken, some 30 seconds at most.

        Args:
            title: one line, with the run's name in it.

        Returns:
            Whether it was taken, by one way at least; not if there is no way, or it has to be held back.
        """
        try:
            return self._send(kind, title, text)
        except Exception as error:
            log.warning(f"alerts: {type(error).__name__} while a message was sent")
            return False

    def close(self) -> None:
        """Wait until what is on its way has been tried, some 30 seconds at most; no more is sent."""
        self._courier.close()

    def _send(self, kind: str, title: str, text: str) -> bool:
        if not self._ways() or (held_back := self._limit.admit([kind], time.time())) is None:
            return False
        message = with_note(self._message(kind, title, text), held_back)
        try:
            return self._courier.post(message).result(LIMIT_SECONDS + 5)
        except StillTrying:
            return False

    def _post_events(self, events: Sequence[Event]) -> None:
        if not self._ways():
            return
        held_back = self._limit.admit([event.kind for event in events], time.time())
        if held_back is not None:
            self._courier.post(with_note(of_events(self._run_dir, events), held_back))

    def _post_held_back(self) -> None:
        held_back = self._limit.admit([], time.time())
        if held_back:
            self._courier.post(self._message("alert", f"{self._run_dir.name}: held back", held_back))

    def _message(self, kind: str, title: str, text: str) -> Message:
        return Message(self._run_dir.name, kind, title, text, time.time())

    def _ways(self) -> list[Channel]:
        """Those that can be used now; what is wrong with the file of addresses is said once."""
        try:
            found, complaint = channels.ways(self._settings), ""
        except UserError as error:
            found, complaint = [], str(error)
        if complaint and complaint != self._complaint:
            log.warning(f"alerts: {complaint}")
        self._complaint = complaint
        return found

    def _news(self) -> list[Event]:
        """The events since the last call; a line that is still being written is left for the next."""
        size = self._size()
        if size == self._read:
            return []
        with open(self._journal, "rb", opener=regular_only) as file:
            file.seek(self._read if self._read < size else 0)  # a shorter file is another one
            begin = file.tell()
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read = begin + len(whole)
        return [event for line in whole.splitlines() if (event := parse_event(line)) is not None]

    def _size(self) -> int:
        try:
            return self._journal.stat().st_size
        except OSError:
            return 0
