"""What a run has gone through, by its journal: starts, lost time, incidents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.journal import INCIDENTS, JOURNAL, Event, Lost, lost_times, read_journal
from ds_gpt2.status.life import TRAINED, State

DAY = 86_400.0
_BYTES = 1 << 20  # of the journal, the newest: a month leaves some hundred thousand

_WANTED = frozenset({"stop", "done"})  # a run that lies still because somebody wanted that has lost nothing


@dataclass(frozen=True)
class Incident:
    time: float  # seconds since 1970
    kind: str
    step: int | None
    text: str


@dataclass(frozen=True)
class History:
    """Of as much of the journal as was read."""

    starts: int
    last_start_time: float | None  # seconds since 1970, as all times here
    read_back_step: int | None  # a checkpoint whose every byte a resume has read and found as it was written
    read_back_time: float | None
    lost_seconds: float  # work that is done again, and time in which nothing is done though it should be
    lost_seconds_24h: float
    goodput: float | None  # share of the time that is not lost; in which nothing was wanted does not count
    goodput_24h: float | None
    incidents: int
    incidents_24h: dict[str, int]  # by kind
    last_incident: Incident | None


def newest_events(run_dir: Path) -> list[Event]:
    """Of the journal, the newest megabyte."""
    try:
        size = (run_dir / JOURNAL).stat().st_size
    except FileNotFoundError:
        return []
    return list(read_journal(run_dir, max(0, size - _BYTES)))


def history_of(events: Sequence[Event], state: State, now: float) -> History:
    """
    Args:
        now: seconds since 1970.
    """
    starts = [event for event in events if event.kind == "start"]
    read_back = next((event for event in reversed(starts) if event.step), None)
    incidents = [event for event in events if event.kind in INCIDENTS]
    last = incidents[-1] if incidents else None
    time = _Time(events, state, now)
    return History(
        starts=len(starts),
        last_start_time=starts[-1].time if starts else None,
        read_back_step=read_back.step if read_back else None,
        read_back_time=read_back.time if read_back else None,
        lost_seconds=time.lost_since(0.0),
        lost_seconds_24h=time.lost_since(now - DAY),
        goodput=time.goodput_since(0.0),
        goodput_24h=time.goodput_since(now - DAY),
        incidents=len(incidents),
        incidents_24h=dict(Counter(event.kind for event in incidents if event.time >= now - DAY)),
        last_incident=Incident(last.time, last.kind, last.step, last.text) if last else None,
    )


class _Time:
    """What became of the time since the first start."""

    def __init__(self, events: Sequence[Event], state: State, now: float) -> None:
        lost = lost_times([*events, *_as_if_it_started(events, state, now)])
        self._lost = [one for one in lost if one.why not in _WANTED]
        self._unwanted = [one for one in lost if one.why in _WANTED]
        self._begun = next((event.time for event in events if event.kind == "start"), now)
        self._ended = events[-1].time if state in ("finished", "stopped") and events else now

    def lost_since(self, time: float) -> float:
        return _seconds(self._lost, time, self._ended)

    def goodput_since(self, time: float) -> float | None:
        wanted = self._ended - max(self._begun, time) - _seconds(self._unwanted, time, self._ended)
        return max(0.0, 1 - self.lost_since(time) / wanted) if wanted > 0 else None


def _as_if_it_started(events: Sequence[Event], state: State, now: float) -> list[Event]:
    """Where a run does not get on, what is lost so far is what would be if it went on now from what is saved."""
    if state in TRAINED:
        return []
    saved = next((event.step for event in reversed(events) if event.kind in ("save", "start")), None)
    return [] if saved is None else [Event(now, "start", "", saved)]


def _seconds(spans: Iterable[Lost], begun: float, ended: float) -> float:
    """That part of the spans which lies between."""
    return sum(max(0.0, min(span.ended, ended) - max(span.begun, begun)) for span in spans)
