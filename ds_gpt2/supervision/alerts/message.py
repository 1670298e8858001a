"""What a message says, as it is read on a phone: a title with the run and what befell it, then the story."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_gpt2.common.formatting import clock
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.run_dir.journal import INCIDENTS, Event

ENDINGS = frozenset({"gave_up", "mistake", "done", "stop"})  # after these the run does not go on by itself

_SHOWN = 8  # events of a message that are told in full
_LONGEST = 3500  # characters of a text: Telegram takes 4096, title and all

_TO_DO = {
    "crash": "it starts again by itself: `./launch.sh status {run}` shows how it gets on",
    "hang": "it starts again by itself: `./launch.sh status {run}` shows how it gets on",
    "gave_up": "look into {log}, fix the cause, then type `./launch.sh resume {run}`",
    "mistake": "look into {log}, fix the cause, then start it again",
    "stop": "type `./launch.sh resume {run}` to go on",
    "done": "`./launch.sh report {run}` draws the curves",
    "disk_low": "`./launch.sh prune {run} --dry-run` shows what could go",
    "not_logged": "make room on the disk of the run's directory, or mount it again: training continues meanwhile",
    "backup_failed": "`./launch.sh backup {run}` tries a copy now; training retries after its next checkpoint",
    "no_checkpoints": "mount or restore the directory of the checkpoints: the run resumes as soon as they are there",
    "save_failed": "`./launch.sh prune {run} --dry-run` shows what could go if the disk is full",
}


@dataclass(frozen=True)
class Message:
    run: str
    kind: str  # of the event that matters most
    title: str  # one line
    text: str
    time: float  # seconds since 1970
    step: int | None = None


def of_events(run_dir: Path, events: Sequence[Event]) -> Message:
    """One message about ``events``, at least one, in the order of time; the newest is told first."""
    newest_first = list(reversed(events))
    leading = max(newest_first, key=lambda event: _weight(event.kind))
    parts = [_paragraph(event) for event in newest_first[:_SHOWN]]
    if len(events) > _SHOWN:
        parts.append(held_back([event.kind for event in newest_first[_SHOWN:]], events[0].time))
    if leading.kind in _TO_DO:
        parts.append(_TO_DO[leading.kind].format(run=_as_typed(run_dir), log=run_dir / "train.log"))
    title = f"{run_dir.name}: {_few([event.kind for event in newest_first])}"
    return Message(run_dir.name, leading.kind, title, _cut("\n\n".join(parts)), leading.time, leading.step)


def joined(messages: Sequence[Message]) -> Message:
    """Several, the oldest first, as one message; the newest is told first."""
    *earlier, newest = messages
    if not earlier:
        return newest
    told = [f"{clock(message.time)}  {message.title}\n{message.text}" for message in reversed(earlier)]
    text = "\n\n".join([newest.text, "Not told before:", *told])
    kind = max((message.kind for message in reversed(messages)), key=_weight)
    return replace(newest, kind=kind, title=f"{newest.title} and {len(earlier)} more", text=_cut(text))


def with_note(message: Message, note: str) -> Message:
    """``message`` with one more paragraph, if ``note`` is not empty."""
    if not note:
        return message
    return replace(message, text=f"{_cut(message.text, _LONGEST - len(note) - 2)}\n\n{note}")


def held_back(kinds: Iterable[str], since: float) -> str:
    """``and 14 more since Tue 25 Nov 10:20: 9 crash, 5 hang``."""
    counts = Counter(kinds)
    each = ", ".join(f"{count} {_spoken(kind)}" for kind, count in counts.most_common())
    return f"and {counts.total()} more since {clock(since)}: {each}"


def _spoken(kind: str) -> str:
    return {"launch": "started", "stop": "stopped"}.get(kind, kind.replace("_", " "))


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 2] + " …"


def _weight(kind: str) -> int:
    return 2 if kind in ENDINGS else 1 if kind in INCIDENTS else 0


def _paragraph(event: Event) -> str:
    where = f"step {event.step:,}, " if event.step is not None else ""
    return f"{event.text}\n{where}{socket.gethostname()}, {clock(event.time)}"


def _few(kinds: Sequence[str]) -> str:
    """The different ones, what matters most first, as far as they fit on a lock screen."""
    different = sorted(dict.fromkeys(kinds), key=_weight, reverse=True)
    return ", ".join([*(_spoken(kind) for kind in different[:3]), *(["..."] if different[3:] else [])])


def _as_typed(run_dir: Path) -> str:
    """The run as the verbs take it."""
    return run_dir.name if run_dir.parent == PROJECT_DIR / "runs" else str(run_dir)
