"""History of a run from its journal: starts, time lost, incidents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.formatting import DAY
from ds_gpt2.run_dir.journal import INCIDENTS, JOURNAL, Event, LostTime, lost_times, read_journal
from ds_gpt2.run_dir.metrics import Record
from ds_gpt2.run_dir.metrics_tail import time_of
from ds_gpt2.tools.resources.run_state import TRAINING_OR_DONE, State

_BYTES = 1 << 24  # newest part of the journal: months of saves, read within a tenth of a second

_LAUNCH_EVENTS = frozenset({"launch", "start", "restart", "stop", "done", "mistake", "gave_up", "orphans"})
_INTENDED = frozenset({"stop", "done"})  # a pause after these events is intended: no time is lost


@dataclass(frozen=True)
class Incident:
    time: float  # seconds since 1970
    kind: str
    step: int | None
    text: str


@dataclass(frozen=True)
class History:
    """History of a run, as far as the journal was read."""

    starts: int
    restarts: int  # starts made by the supervisor
    resumes: int  # starts made by the user, the first one not counted
    last_start_time: float | None  # seconds since 1970, as all times here
    read_back_step: int | None  # step of the checkpoint that the last resume read and verified completely
    read_back_time: float | None
    lost_seconds: float  # repeated work, and time without progress, intended pauses not counted
    lost_seconds_24h: float
    kept_share: float | None  # share of the time that is not lost; intended pauses count in neither
    kept_share_24h: float | None
    goodput: float | None  # share of the time since the first start spent in steps that count: perf/goodput
    goodput_24h: float | None
    incidents: int
    incidents_24h: dict[str, int]  # by kind
    last_incident: Incident | None


def newest_events(run_dir: Path) -> list[Event]:
    """Return the events in the newest 16 MiB of the journal."""
    try:
        size = (run_dir / JOURNAL).stat().st_size
    except FileNotFoundError:
        return []
    return list(read_journal(run_dir, max(0, size - _BYTES)))


@dataclass(frozen=True)
class Goodput:
    """``perf/goodput`` as last recorded, and for the 24 hours before that record."""

    whole: float
    day: float | None

    @classmethod
    def of(cls, newest: Record, day_before: Record | None, first_start: float | None) -> Goodput:
        """Compute the goodput of the last day from two records of the goodput since the first start.

        Args:
            newest: the newest record with a goodput.
            day_before: the newest record with a goodput that is at least a day older.
            first_start: seconds since 1970.
        """
        whole, now = newest["perf/goodput"], time_of(newest)
        then = time_of(day_before) if day_before is not None else None
        if now is None or then is None or first_start is None or day_before is None or not first_start < then < now:
            return cls(whole, None)
        trained = whole * (now - first_start) - day_before["perf/goodput"] * (then - first_start)
        return cls(whole, min(1.0, max(0.0, trained / (now - then))))


def history_of(events: Sequence[Event], state: State, now: float, goodput: Goodput | None = None) -> History:
    """Return the starts, failures and lost time of a run.

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
    """Return for each start, in order, whether the supervisor made it; False for the first start and for resumes."""
    made: list[bool] = []
    launches: list[bool] = []  # since the previous start: whether each launch was a restart by the supervisor
    previous = ""
    for event in events:
        if event.kind == "launch":
            launches.append(bool(event.facts.get("restart", previous == "restart")))  # absent in older journals
        elif event.kind == "start":
            made.append(bool(made) and bool(launches) and all(launches))
            launches = []
        if event.kind in _LAUNCH_EVENTS:
            previous = event.kind
    return made


def lost_by_start(events: Sequence[Event]) -> dict[float, float]:
    """Return the seconds lost before each start, by the time of the start; intended pauses are left out."""
    return {lost.end: lost.seconds for lost in lost_times(list(events)) if lost.cause not in _INTENDED}


class _Time:
    """Time since the first start, divided into lost time, intended pauses and the rest."""

    def __init__(self, events: Sequence[Event], state: State, now: float) -> None:
        lost = lost_times([*events, *_as_if_resumed(events, state, now)])
        self._lost = [span for span in lost if span.cause not in _INTENDED]
        self._pauses = [span for span in lost if span.cause in _INTENDED]
        self._start = next((event.time for event in events if event.kind == "start"), now)
        self._end = events[-1].time if state in ("finished", "stopped") and events else now

    def lost_since(self, time: float) -> float:
        return _overlap(self._lost, time, self._end)

    def kept_since(self, time: float) -> float | None:
        intended = self._end - max(self._start, time) - _overlap(self._pauses, time, self._end)
        return max(0.0, 1 - self.lost_since(time) / intended) if intended > 0 else None


def _as_if_resumed(events: Sequence[Event], state: State, now: float) -> list[Event]:
    """Return a start from the last save at ``now`` for an interrupted run: its time since that save is lost."""
    if state in TRAINING_OR_DONE:
        return []
    saved = next((event.step for event in reversed(events) if event.kind in ("save", "start")), None)
    return [] if saved is None else [Event(now, "start", "", saved)]


def _overlap(spans: Iterable[LostTime], start: float, end: float) -> float:
    """Return the seconds of the spans that lie between ``start`` and ``end``."""
    return sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans)
