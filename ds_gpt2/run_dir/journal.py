"""``journal.jsonl`` in a run's directory: the events of the run, one JSON object per line.

Rank 0 and the supervisor append to it, each event with a single write. Lines are never deleted: unlike the metrics, the
journal retains what happened in steps that were trained again.
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
    "stop",  # stopped on request, with everything saved
    "mistake",  # a UserError: not restarted
    "crash",
    "hang",
    "restart",  # the supervisor will start the ranks again; the text says how
    "gave_up",  # no more restarts
    "host_lost",  # a host of several has stopped responding, or cannot be used: the run continues on the others
    "host_back",  # it answers again, and takes part from this launch on
    "few_hosts",  # fewer hosts answer than cluster.min_nodes: the supervisor waits
    "orphans",  # processes of a launcher or supervisor that had died were ended
    "not_finite",  # a loss or gradient was Inf or NaN: the update was skipped
    "spike",
    "grad_spike",
    "divergence",
    "skipped_run",
    "frozen",
    "drift",
    "stuck_data",
    "evaluation_failed",  # a part of the evaluation of `step` is missing
    "data_error",  # a shard could not be read; the read is retried
    "rollback",
    "disk_low",
    "not_logged",  # the run's directory was not writable
    "no_checkpoints",  # the saved checkpoints are missing: the supervisor waits for them
    "backup_failed",  # a backup failed; repeated once a day while backups fail
    "backup_ok",  # a backup succeeded after a failure
    "alert",  # a message was sent, or its delivery failed
]
_MAX_PENDING = 1000  # events

KINDS: tuple[str, ...] = get_args(Kind)

ROUTINE = frozenset({"launch", "start", "restart", "save", "best", "done", "stop", "host_back", "backup_ok", "alert"})
INCIDENTS = frozenset(KINDS) - ROUTINE  # events that the user should check

log = logging.getLogger(__name__)


Time = Annotated[float, Field(ge=0, lt=END_OF_TIME, allow_inf_nan=False)]  # seconds since 1970


@dataclass(frozen=True)
class Event:
    """One line of the journal."""

    time: Time  # seconds since 1970
    kind: str
    text: str  # one line for the user
    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # machine-readable details

    def time_in(self, fact: str) -> float:
        """Return the time in ``facts[fact]``, in seconds since 1970; the time of the event if there is none."""
        time = self.facts.get(fact)
        return float(time) if time is not None and safe_json.is_time(time) else self.time


_EVENT = TypeAdapter(Event)


class Journal:
    """Appends to a run's journal, also after the run's directory is moved.

    A failed write is logged and never ends a run: the event is written together with the next one.
    """

    def __init__(self, run_dir: Path) -> None:
        """Open the run's directory; no file is created."""
        self._run_dir = OpenDirectory(run_dir)
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)  # lines that are not written yet
        self._lock = threading.Lock()

    @property
    def _file(self) -> Path:
        return self._run_dir.path / JOURNAL

    def size(self) -> int:
        """Return the size of the file in bytes; 0 if it does not exist."""
        try:
            return self._file.stat().st_size
        except OSError:
            return 0

    def read(self) -> Iterator[Event]:
        """Yield all events, oldest first."""
        return read_journal(self._file.parent)

    def write(self, kind: Kind, text: str, step: int | None = None, **facts: Any) -> Event | None:
        """Append an event with the current time.

        Args:
            text: one line for the user.
            facts: machine-readable details; the values must be serializable as JSON.

        Returns:
            None if the event was written; the event if the write failed.
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
        """Write the events whose earlier writes failed.

        Raises:
            OSError: the write fails again.
        """
        if self._pending:
            self._write()

    def _write(self, *lines: bytes) -> None:
        """Write the pending lines, then ``lines``."""
        with self._lock:
            self._pending.extend(lines)
            while self._pending:
                with contextlib.suppress(NotDurableError):  # the line is written; writing it again would duplicate it
                    append_lines(self._file, self._pending[0], durable=True)
                self._pending.popleft()


def read_journal(run_dir: Path, start: int = 0) -> Iterator[Event]:
    """Yield the events from byte ``start`` of the file on, without damaged lines; none if there is no file."""
    try:
        with open(run_dir / JOURNAL, "rb", opener=regular_only) as file:
            file.seek(start)
            for line in file:
                if (event := parse_event(line)) is not None:
                    yield event
    except FileNotFoundError:
        return


def last_saved_step(run_dir: Path) -> int | None:
    """Return the step of the newest checkpoint in the journal; None if there is none.

    Checkpoints from before a new start at step 0 under the same name do not count.
    """
    saved = None
    for event in read_journal(run_dir):
        if event.kind == "start" and not event.step:
            saved = None
        elif event.kind == "save":
            saved = event.step
    return saved


def parse_event(line: bytes) -> Event | None:
    """Return the event in a line of the journal; None if the line is damaged."""
    try:
        return _EVENT.validate_python(safe_json.parse(line))
    except ValueError:
        return None


@dataclass(frozen=True)
class LostTime:
    """An interval in which the run made no progress, or made progress that was lost."""

    start: float  # seconds since 1970: when the state was reached from which the run resumed later
    end: float  # seconds since 1970: when training resumed from that state
    cause: str  # kind of the event that ended the run

    @property
    def seconds(self) -> float:
        return self.end - self.start


_ENDS = frozenset({"crash", "hang", "stop", "rollback", "done"})


def lost_times(events: list[Event]) -> list[LostTime]:
    """Return the time lost by each interruption: from when a state was reached to when training resumed from it.

    This includes the work that was repeated, the downtime, and the startup time. If a later start resumed from an
    earlier state, its interval replaces the intervals that it contains.
    """
    reached: dict[int, float] = {}  # step -> when its state was reached, in seconds since 1970
    lost: list[LostTime] = []
    first = next((event for event in events if event.kind == "start"), None)
    ending: Event | None = None
    for event in events:
        if event.kind == "save" and event.step is not None:
            reached[event.step] = event.time_in("taken")
        elif event.kind in _ENDS:
            ending = event
        elif event.kind == "start" and event.step is not None:
            start = reached.get(event.step)
            if start is None and first is not None and event.step in (0, first.step):  # of a fork: above 0
                start = first.time
            if start is not None and start < event.time:
                lost = [interval for interval in lost if interval.start < start]
                lost.append(LostTime(start, event.time, ending.kind if ending else "crash"))
            reached = {step: when for step, when in reached.items() if step <= event.step}
            ending = None
    return lost
