"""What a run has gone through, by its journal: starts, lost time, incidents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.run_dir.journal import INCIDENTS, JOURNAL, Event, LostTime, lost_times, read_journal
from ds_gpt2.run_dir.metrics import Record
from ds_gpt2.run_dir.metrics_tail import time_of
from ds_gpt2.tools.resources.run_state import TRAINED, State

DAY = 86_400.0
_BYTES = 1 << 24  # of the journal, the newest: months of saves; read in a tenth of a second

_TURNS = frozenset({"launch", "start", "restart", "stop", "done", "mistake", "gave_up", "orphans"})
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
    restarts: int  # of them those that the supervisor made by itself
    resumes: int  # and those that were asked for, the first start not counted
    last_start_time: float | None  # seconds since 1970, as all times here
    read_back_step: int | None  # a checkpoint whose every byte a resume has read and found as it was written
    read_back_time: float | None
    lost_seconds: float  # work that is done again, and time in which nothing is done though it should be
    lost_seconds_24h: float
    kept_share: float | None  # of the time, what is not lost; in which nothing was wanted does not count
    kept_share_24h: float | None
    goodput: float | None  # share of the time since the first start that went into steps that count: perf/goodput
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


@dataclass(frozen=True)
class Goodput:
    """``perf/goodput`` as last recorded, and of the day before that."""

    whole: float
    day: float | None

    @classmethod
    def of(cls, newest: Record, day_before: Record | None, begun: float | None) -> Goodput:
        """
        Args:
            newest: the newest record that has it.
            day_before: the newest one of at least a day earlier that has it.
            begun: the run's first start, seconds since 1970.
        """
        whole, now = newest["perf/goodput"], time_of(newest)
        then = time_of(day_before) if day_before is not None else None
        if now is None or then is None or begun is None or day_before is None or not begun < then < now:
            return cls(whole, None)
        trained = whole * (now - begun) - day_before["perf/goodput"] * (then - begun)
        return cls(whole, min(1.0, max(0.0, trained / (now - then))))


def history_of(events: Sequence[Event], state: State, now: float, goodput: Goodput | None = None) -> History:
    """
    Args:
        now: seconds since 1970.
    """
    restarts = sum(restarts_of(events))
    starts = [event for event in events if event.kind == "start"]
    read_back = next((event for event in reversed(starts) if event.step), None)
    incidents = [event for event in events if event.kind in INCIDENTS]
    last = incidents[-1] if incidents else None
    time = _Time(events, state, now)
    return History(
        starts=len(starts),
        restarts=restarts,
        resumes=max(0, len(starts) - 1) - restarts,
        last_start_time=starts[-1].time if starts else None,
        read_back_step=read_back.step if read_back else None,
        read_back_time=read_back.time if read_back else None,
        lost_seconds=time.lost_since(0.0),
        lost_seconds_24h=time.lost_since(now - DAY),
        kept_share=time.kept_since(0.0),
        kept_share_24h=time.kept_since(now - DAY),
        goodput=goodput.whole if goodput else None,
        goodput_24h=goodput.day if goodput else None,
        incidents=len(incidents),
        incidents_24h=dict(Counter(event.kind for event in incidents if event.time >= now - DAY)),
        last_incident=Incident(last.time, last.kind, last.step, last.text) if last else None,
    )


def restarts_of(events: Sequence[Event]) -> list[bool]:
    """Whether the supervisor made each start by itself, in order; the first start, and one by hand, are False."""
    made: list[bool] = []
    launches: list[bool] = []  # since the start before, whether each was one of the supervisor's own
    turn = ""
    for event in events:
        if event.kind == "launch":
            launches.append(bool(event.facts.get("restart", turn == "restart")))  # older journals do not say
        elif event.kind == "start":
            made.append(bool(made) and bool(launches) and all(launches))
            launches = []
        if event.kind in _TURNS:
            turn = event.kind
    return made


def lost_by_start(events: Sequence[Event]) -> dict[float, float]:
    """Seconds that were lost before each start that cost some, by the time of the start; a wanted pause costs none."""
    return {lost.end: lost.seconds for lost in lost_times(list(events)) if lost.cause not in _WANTED}


class _Time:
    """What became of the time since the first start."""

    def __init__(self, events: Sequence[Event], state: State, now: float) -> None:
        lost = lost_times([*events, *_as_if_it_started(events, state, now)])
        self._lost = [one for one in lost if one.cause not in _WANTED]
        self._unwanted = [one for one in lost if one.cause in _WANTED]
        self._begun = next((event.time for event in events if event.kind == "start"), now)
        self._ended = events[-1].time if state in ("finished", "stopped") and events else now

    def lost_since(self, time: float) -> float:
        return _seconds(self._lost, time, self._ended)

    def kept_since(self, time: float) -> float | None:
        wanted = self._ended - max(self._begun, time) - _seconds(self._unwanted, time, self._ended)
        return max(0.0, 1 - self.lost_since(time) / wanted) if wanted > 0 else None


def _as_if_it_started(events: Sequence[Event], state: State, now: float) -> list[Event]:
    """Where a run does not get on, what is lost so far is what would be if it went on now from what is saved."""
    if state in TRAINED:
        return []
    saved = next((event.step for event in reversed(events) if event.kind in ("save", "start")), None)
    return [] if saved is None else [Event(now, "start", "", saved)]


def _seconds(spans: Iterable[LostTime], begun: float, ended: float) -> float:
    """That part of the spans which lies between."""
    return sum(max(0.0, min(span.end, ended) - max(span.start, begun)) for span in spans)
