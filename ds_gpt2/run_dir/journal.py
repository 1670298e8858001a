"""``journal.jsonl`` in a run's directory: what befell the run, one JSON object an event.

Rank 0 and the supervisor both append to it, each event in one write, and nobody ever takes a line back: unlike the
metrics it keeps what was lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import NotDurableError, append_lines, regular_only
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.safe_json import END_OF_TIME

JOURNAL = "journal.jsonl"

Kind = Literal[
    "launch",  # the supervisor starts the ranks
    "start",  # the ranks begin to train after `step`
    "save",  # the checkpoint of `step` is committed
    "save_failed",
    "best",  # the validation loss of `step` is the best so far
    "done",
    "stop",  # on request, saved
    "mistake",  # of the user's: not tried again
    "crash",
    "hang",
    "restart",  # the supervisor will start again, and how
    "gave_up",  # no more restarts
    "orphans",  # processes of a launcher or supervisor that died were ended
    "not_finite",  # a loss or gradient was Inf or NaN: the update was skipped
    "spike",
    "divergence",
    "skipped_run",
    "frozen",
    "drift",
    "stuck_data",
    "data_error",  # a shard could not be read, and is tried again
    "rollback",
    "disk_low",
    "not_logged",  # the run's directory cannot be written
    "no_checkpoints",  # those that were saved are not there: nothing is started until they are
    "backup_failed",  # a copy was not made; once a day while that lasts
    "backup_ok",  # a copy was made after that
    "alert",  # a message was sent, or could not be
]
_MISSED = 1000  # events

KINDS: tuple[str, ...] = get_args(Kind)

ROUTINE = frozenset({"launch", "start", "restart", "save", "best", "done", "stop", "backup_ok", "alert"})
INCIDENTS = frozenset(KINDS) - ROUTINE  # what a person would want to look at

log = logging.getLogger(__name__)


Time = Annotated[float, Field(ge=0, lt=END_OF_TIME, allow_inf_nan=False)]  # seconds since 1970


@dataclass(frozen=True)
class Event:
    """One line of the journal."""

    time: Time  # seconds since 1970
    kind: str
    text: str  # one line for a person
    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # the same for a program

    def time_in(self, fact: str) -> float:
        """The time that a fact gives, in seconds since 1970; that of the event if there is none."""
        time = self.facts.get(fact)
        return float(time) if time is not None and safe_json.is_time(time) else self.time


_EVENT = TypeAdapter(Event)


class Journal:
    """Appends to a run's journal, wherever the run is moved meanwhile.

    A failure to write is logged and ends no run: the event is written before the next one, if the disk takes it then.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = OpenDirectory(run_dir)
        self._missed: deque[bytes] = deque(maxlen=_MISSED)  # lines that could not be written
        self._lock = threading.Lock()

    @property
    def _file(self) -> Path:
        return self._run_dir.path / JOURNAL

    def size(self) -> int:
        """Bytes of the file so far."""
        try:
            return self._file.stat().st_size
        except OSError:
            return 0

    def read(self) -> Iterator[Event]:
        """The events so far."""
        return read_journal(self._file.parent)

    def write(self, kind: Kind, text: str, step: int | None = None, **facts: Any) -> Event | None:
        """
        Args:
            text: one line.
            facts: plain values, fit for JSON.

        Returns:
            The event if it could not be written; None if it was.
        """
        event = Event(time.time(), kind, text, step, facts)
        line = {"time": event.time, "kind": kind, "step": step, "text": text, **({"facts": facts} if facts else {})}
        try:
            self._write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        except OSError as error:
            log.warning(f"the journal cannot be written: {error}; the event: {text}")
            return event
        return None

    def write_pending(self) -> None:
        """Write the events that could not be written before.

        Raises:
            OSError: the oldest of them cannot be written now either.
        """
        if self._missed:
            self._write()

    def _write(self, *lines: bytes) -> None:
        """Write ``lines``, and before them those that could not be written."""
        with self._lock:
            self._missed.extend(lines)
            while self._missed:
                with contextlib.suppress(NotDurableError):  # it is written; to write it again would double it
                    append_lines(self._file, self._missed[0], durable=True)
                self._missed.popleft()


def read_journal(run_dir: Path, start: int = 0) -> Iterator[Event]:
    """The events from byte ``start`` of the file on; none if there is no file. Lines cut by a crash are left out."""
    try:
        with open(run_dir / JOURNAL, "rb", opener=regular_only) as file:
            file.seek(start)
            for line in file:
                if (event := parse_event(line)) is not None:
                    yield event
    except FileNotFoundError:
        return


def last_saved_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that the journal knows of; None if it knows of none.

    Those of before the run was begun anew under its name do not count.
    """
    saved = None
    for event in read_journal(run_dir):
        if event.kind == "start" and not event.step:
            saved = None
        elif event.kind == "save":
            saved = event.step
    return saved


def parse_event(line: bytes) -> Event | None:
    """The event in a line of the journal; None if it is damaged."""
    try:
        return _EVENT.validate_python(safe_json.parse(line))
    except ValueError:
        return None


@dataclass(frozen=True)
class LostTime:
    """A time in which the run did not get further."""

    start: float  # seconds since 1970: when the state was reached from which the run resumed later
    end: float  # seconds since 1970: when training resumed from that state
    cause: str  # kind of the event that ended the run

    @property
    def seconds(self) -> float:
        return self.end - self.start


_ENDS = frozenset({"crash", "hang", "stop", "rollback", "done"})


def lost_times(events: list[Event]) -> list[LostTime]:
    """What each interruption cost: from when the state was reached that a start went on from, to that start.

    So it counts the work that had to be done again, the time the run lay still, and the start itself. Where a later
    start went back further, that one's time holds the earlier ones.
    """
    reached: dict[int, float] = {}  # step -> when it was saved, or trained up to
    lost: list[LostTime] = []
    ending: Event | None = None
    for event in events:
        if event.kind == "save" and event.step is not None:
            reached[event.step] = event.time_in("taken")
        elif event.kind in _ENDS:
            ending = event
        elif event.kind == "start" and event.step is not None:
            start = reached.get(event.step)
            if start is None and event.step == 0:
                start = next(first.time for first in events if first.kind == "start")
            if start is not None and start < event.time:
                lost = [interval for interval in lost if interval.start < start]
                lost.append(LostTime(start, event.time, ending.kind if ending else "crash"))
            reached = {step: when for step, when in reached.items() if step <= event.step}
            ending = None
    return lost
