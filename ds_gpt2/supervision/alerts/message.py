"""The text of an alert, short enough for a phone: a title with the run and what happened, then the details."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_gpt2.common.formatting import clock, counted, truncated
from ds_gpt2.config.run_location import run_argument
from ds_gpt2.config.settings import LOG
from ds_gpt2.run_dir.journal import INCIDENTS, Event

FINAL_KINDS = frozenset({"gave_up", "mistake", "done", "stop"})  # the run does not continue after one of these

_MAX_EVENTS = 8  # shown in full in a message
_MAX_CHARACTERS = 3500  # of a text: Telegram accepts 4096, including the title

_NEXT_STEPS = {
    "crash": "the run restarts automatically: `./launch.sh status {run}` shows its progress",
    "hang": "the run restarts automatically: `./launch.sh status {run}` shows its progress",
    "gave_up": "read {log}, fix the cause, then run `./launch.sh resume {run}`",
    "mistake": "read {log}, fix the cause, then start the run again",
    "stop": "`./launch.sh resume {run}` continues the run",
    "done": "`./launch.sh report {run}` writes a report with the curves",
    "host_lost": "the run restarts on the hosts that answer: `./launch.sh status {run}` shows them",
    "few_hosts": "the run restarts automatically when enough hosts answer",
    "disk_low": "`./launch.sh prune {run} --dry-run` shows what can be deleted",
    "not_logged": "free space on the disk of the run's directory, or mount it again: training continues meanwhile",
    "backup_failed": "`./launch.sh backup {run}` makes a backup now; training retries after its next checkpoint",
    "no_checkpoints": "mount or restore the directory of the checkpoints: the run then resumes automatically",
    "save_failed": "if the disk is full, `./launch.sh prune {run} --dry-run` shows what can be deleted",
}


@dataclass(frozen=True)
class Message:
    """An alert as it is sent."""

    run: str
    kind: str  # of the most important event
    title: str  # one line
    text: str
    time: float  # seconds since 1970
    step: int | None = None


def from_events(run_dir: Path, events: Sequence[Event]) -> Message:
    """Return one message about ``events``, at least one, in chronological order; the text has the newest first."""
    newest_first = list(reversed(events))
    leading = max(newest_first, key=lambda event: _importance(event.kind))
    parts = [_paragraph(event) for event in newest_first[:_MAX_EVENTS]]
    if len(events) > _MAX_EVENTS:
        parts.append(count_more([event.kind for event in newest_first[_MAX_EVENTS:]], events[0].time))
    if leading.kind in _NEXT_STEPS:
        parts.append(_NEXT_STEPS[leading.kind].format(run=run_argument(run_dir), log=run_dir / LOG))
    title = f"{run_dir.name}: {_kinds_text([event.kind for event in newest_first])}"
    text = truncated("\n\n".join(parts), _MAX_CHARACTERS)
    return Message(run_dir.name, leading.kind, title, text, leading.time, leading.step)


def combine(messages: Sequence[Message]) -> Message:
    """Return one message with all of ``messages``, given in chronological order; the text has the newest first."""
    *earlier, newest = messages
    if not earlier:
        return newest
    paragraphs = [f"{clock(message.time)}  {message.title}\n{message.text}" for message in reversed(earlier)]
    text = truncated("\n\n".join([newest.text, "Not delivered before:", *paragraphs]), _MAX_CHARACTERS)
    kind = max((message.kind for message in reversed(messages)), key=_importance)
    return replace(newest, kind=kind, title=f"{newest.title} and {len(earlier)} more", text=text)


def with_note(message: Message, note: str) -> Message:
    """Return ``message`` with ``note`` as its last paragraph; unchanged if ``note`` is empty."""
    if not note:
        return message
    return replace(message, text=f"{truncated(message.text, _MAX_CHARACTERS - len(note) - 2)}\n\n{note}")


def count_more(kinds: Iterable[str], since: float) -> str:
    """Return a summary of events that are not shown: ``14 more events since Tue 25 Nov 10:20: 9 crash, 5 hang``."""
    counts = Counter(kinds)
    each = ", ".join(f"{count} {_label(kind)}" for kind, count in counts.most_common())
    return f"{counted(counts.total(), 'more event')} since {clock(since)}: {each}"


def _label(kind: str) -> str:
    return {"launch": "started", "stop": "stopped"}.get(kind, kind.replace("_", " "))


def _importance(kind: str) -> int:
    return 2 if kind in FINAL_KINDS else 1 if kind in INCIDENTS else 0


def _paragraph(event: Event) -> str:
    step = f"step {event.step:,}, " if event.step is not None else ""
    return f"{event.text}\n{step}{socket.gethostname()}, {clock(event.time)}"


def _kinds_text(kinds: Sequence[str]) -> str:
    """Return the three most important kinds of event, as many as fit on a lock screen."""
    distinct = sorted(dict.fromkeys(kinds), key=_importance, reverse=True)
    return ", ".join([*(_label(kind) for kind in distinct[:3]), *(["..."] if distinct[3:] else [])])
