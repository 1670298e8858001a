"""The pace of a run and its time left: one definition for the console, ``status`` and ``report``.

Time left = time of a training step x steps left
          + usual time of an evaluation x evaluations left
          + usual blocking time of a save x saves left.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ds_gpt2.config.settings import Settings

EVALUATIONS = ("samples", "hellaswag", "histograms", "validation")  # sections of the settings with their own ``every``
_INTERVALS = 4  # different intervals of ``evaluations`` that are estimated separately, the shortest

RECENT = 50  # steps
RECENT_LABEL = f"median of last {RECENT} steps"

WINDOW = 2000  # newest steps whose mean is the time of a step
_STRETCHES = 8  # parts of the window whose spread gives the range
_ENOUGH = 10  # steps since the newest start from which on earlier steps are ignored
_USUAL = 5  # newest evaluations or saves whose median is their usual time
_SEARCHED = 64  # multiples of an interval that are searched for an evaluation of exactly these kinds

_Kinds = frozenset[str]


def evaluation_intervals(settings: Settings) -> dict[str, int]:
    """Return the interval in steps of each kind of evaluation by its dotted section; 0: never."""
    found = {name: getattr(settings, name).every for name in EVALUATIONS}
    return found | {f"evaluations.{name}": each.every for name, each in settings.evaluations.items()}


def recent(values: Sequence[float | None]) -> float | None:
    """Return the median of the finite values among the newest ``RECENT`` of a metric; None if there is none.

    All commands show this figure for training loss, tokens/s, gradient norm and step time.
    """
    finite = [value for value in values[-RECENT:] if value is not None and math.isfinite(value)]
    return statistics.median(finite) if finite else None


def recent_step_seconds(step_ms: Sequence[float | None]) -> float | None:
    """Return ``recent`` of the step times ``perf/step_ms``, in seconds."""
    milliseconds = recent(step_ms)
    return None if milliseconds is None else milliseconds / 1000


@dataclass(frozen=True)
class Range:
    """A mean with the 10th and 90th percentile."""

    mean: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Return the range multiplied by ``factor``, in the same unit."""
        return Range(self.mean * factor, self.low * factor, self.high * factor)


class Timed(NamedTuple):
    """The times of one record, in seconds. Evaluation and save happened after the previous step."""

    step: int
    train: float
    evaluation: float
    save: float


def timed_of(records: Iterable[Mapping[str, Any]]) -> Iterator[Timed]:
    """Yield the times of records, which are in ascending order of steps.

    If a record has no ``perf/step_ms``, the time since the previous record is used.
    """
    before: tuple[int, float] | None = None
    for record in records:
        step, when = record["step"], _number(record.get("time"))
        train = _number(record.get("perf/step_ms")) / 1000
        evaluation, save = (_or_zero(record.get(tag)) / 1000 for tag in ("perf/eval_ms", "perf/save_ms"))
        if math.isnan(train) and before is not None and step > before[0] and not math.isnan(when - before[1]):
            train = max(0.0, (when - before[1]) / (step - before[0]) - evaluation - save)
        before = (step, when)
        if not math.isnan(train):
            yield Timed(step, train, evaluation, save)


@dataclass(frozen=True)
class Cadence:
    """The intervals at which a run evaluates and saves."""

    evaluations: Mapping[str, int]  # steps between two evaluations of a kind, above 0
    save: int  # steps; 0: at the last step only

    @classmethod
    def of(cls, settings: Settings) -> Cadence:
        found = {name: getattr(settings, name).every for name in EVALUATIONS}
        # Evaluations with equal intervals are always due together: they are one kind.
        intervals = sorted({each.every for each in settings.evaluations.values()} - {0})[:_INTERVALS]
        found |= {f"evaluations every {every}": every for every in intervals}
        return cls({name: every for name, every in found.items() if every}, settings.checkpoint.every)

    def due(self, step: int) -> _Kinds:
        """Return the kinds of evaluation that are due after ``step``; after the last step all kinds are."""
        return frozenset(name for name, every in self.evaluations.items() if step % every == 0)

    def evaluations_left(self, step: int, steps: int) -> dict[_Kinds, int]:
        """Return how often exactly these kinds are due together after ``step``; at the last step all are."""
        if step >= steps or not self.evaluations:
            return {}
        exactly: dict[_Kinds, int] = {}
        for kinds, every in self._intervals.items():
            count = (steps - 1) // every - step // every
            exactly[kinds] = count - sum(other for larger, other in exactly.items() if kinds < larger)
        exactly[frozenset(self.evaluations)] += 1
        return {kinds: count for kinds, count in exactly.items() if count}

    def saves_left(self, step: int, steps: int) -> int:
        """Return the number of saves after ``step``; the last step is always saved."""
        if step >= steps:
            return 0
        return 1 + ((steps - 1) // self.save - step // self.save if self.save else 0)

    def occasions(self, step: int) -> list[int]:
        """Return the steps of the records with the times of the newest evaluations and saves up to ``step``."""
        found = {due for kinds in self._intervals for due in self._newest_of(kinds, step)}
        if self.save:
            newest = (step - 1) // self.save
            found |= {number * self.save for number in range(max(1, newest - _USUAL + 1), newest + 1)}
        return sorted(due + 1 for due in found)

    def _newest_of(self, kinds: _Kinds, step: int) -> list[int]:
        every = self._intervals[kinds]
        newest = (step - 1) // every
        steps = (number * every for number in range(newest, max(0, newest - _SEARCHED), -1))
        return list(itertools.islice((due for due in steps if self.due(due) == kinds), _USUAL))

    @functools.cached_property
    def _intervals(self) -> dict[_Kinds, int]:
        """The steps between two evaluations of each combination of kinds, the largest combination first."""
        names = tuple(self.evaluations)
        sizes = range(len(names), 0, -1)
        chosen = (part for size in sizes for part in itertools.combinations(names, size))
        return {frozenset(part): math.lcm(*(self.evaluations[name] for name in part)) for part in chosen}


class _Step(NamedTuple):
    step: int
    train: float
    between: float  # evaluation and save
    off_interval: bool  # a save that was not due by the interval: a best checkpoint, the end of an epoch


class Pace:
    """The pace of one run. Add the times of its records in ascending order of steps.

    The first step of a start is ignored: it may include compilation, and the time before it is of another process.
    """

    def __init__(self, cadence: Cadence, starts: Sequence[int]) -> None:
        """
        Args:
            starts: the step of each start of the run, the newest last.
        """
        self._cadence = cadence
        self._first_steps = {step + 1 for step in starts}
        self._newest_start = starts[-1] if starts else 0
        self._steps: deque[_Step] = deque()
        self._all, self._fresh = _Sum(), _Sum()  # of these steps, and of those since the newest start
        self._off_interval = 0  # saves among them
        self._first: float | None = None  # seconds of the newest first step, used until there are others
        self._evaluations: dict[_Kinds, deque[float]] = {}
        self._saves: deque[float] = deque(maxlen=_USUAL)

    def add(self, timed: Timed) -> None:
        if timed.step in self._first_steps:
            self._first = timed.train
            return
        kinds = self._cadence.due(timed.step - 1)
        if kinds and timed.evaluation:
            self._evaluations.setdefault(kinds, deque(maxlen=_USUAL)).append(timed.evaluation)
        if timed.save:
            self._saves.append(timed.save)
        small = 0.0 if kinds else timed.evaluation  # part of every step, such as its line in the log
        off_interval = bool(timed.save) and (not self._cadence.save or (timed.step - 1) % self._cadence.save != 0)
        self._count(_Step(timed.step, timed.train + small, timed.evaluation - small + timed.save, off_interval), 1)

    @property
    def step_seconds(self) -> Range | None:
        """Seconds of a training step without evaluation and saving; None if no step is known."""
        counted = self._counted()
        if not counted:
            return None if self._first is None else Range(self._first, self._first, self._first)
        return _range([each.train for each in counted])

    @property
    def wall_seconds(self) -> Range | None:
        """Seconds from one step to the next in the window, with evaluation and saving."""
        counted = self._counted()
        return _range([each.train + each.between for each in counted]) if counted else self.step_seconds

    def mean_step_seconds(self) -> float | None:
        """Return the mean of ``step_seconds`` without its range; takes microseconds, for use at every step."""
        counted = self._fresh if self._is_fresh() else self._all
        return counted.seconds / counted.steps if counted.steps else self._first

    def left(self, step: int, steps: int) -> Range | None:
        """Return the seconds from the end of ``step`` to the end of ``steps``; None if no step is known."""
        pace, between = self.step_seconds, self._between_left(step, steps)
        if pace is None:
            return None
        alone = pace.times(max(0, steps - step))
        return Range(alone.mean + between, alone.low + between, alone.high + between)

    def mean_left(self, step: int, steps: int) -> float | None:
        """Return the mean of ``left`` without its range, see ``mean_step_seconds``."""
        mean = self.mean_step_seconds()
        return None if mean is None else max(0, steps - step) * mean + self._between_left(step, steps)

    def _between_left(self, step: int, steps: int) -> float:
        """Return the seconds of the evaluations and saves that are left; kinds without a known time count as 0."""
        left = self._cadence.evaluations_left(step, steps)
        seconds = sum(count * self._evaluation_seconds(kinds) for kinds, count in left.items())
        if self._saves:
            off_interval = self._off_interval / max(1, len(self._steps)) * max(0, steps - step)
            seconds += (self._cadence.saves_left(step, steps) + off_interval) * statistics.median(self._saves)
        return seconds

    def _evaluation_seconds(self, kinds: _Kinds) -> float:
        """Return the usual time of these kinds together; until it is known, estimate it from other combinations."""
        if kinds in self._evaluations:
            return statistics.median(self._evaluations[kinds])
        seconds, missing = 0.0, set(kinds)
        for part in sorted(self._evaluations, key=len, reverse=True):
            if part <= missing:
                seconds += statistics.median(self._evaluations[part])
                missing -= part
        larger = [part for part in self._evaluations if missing and missing <= part]
        if larger:
            seconds += statistics.median(self._evaluations[min(larger, key=len)])
        return seconds

    def _count(self, step: _Step, sign: Literal[1, -1]) -> None:
        """Add ``step`` to the window (``sign`` 1), or remove it (-1)."""
        if sign == 1:
            self._steps.append(step)
            if len(self._steps) > WINDOW:
                self._count(self._steps.popleft(), -1)
        self._all.add(step, sign)
        if step.step > self._newest_start:
            self._fresh.add(step, sign)
        self._off_interval += sign * step.off_interval

    def _counted(self) -> list[_Step]:
        """Return the steps since the newest start, which may use other ranks; all steps until these are enough."""
        if not self._is_fresh():
            return list(self._steps)
        return [each for each in self._steps if each.step > self._newest_start]

    def _is_fresh(self) -> bool:
        return self._fresh.steps >= _ENOUGH


class _Sum:
    """Seconds of training, and the number of steps."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def add(self, step: _Step, sign: Literal[1, -1]) -> None:
        self.seconds += sign * step.train
        self.steps += sign


def _range(seconds: Sequence[float]) -> Range:
    """Return the mean, and percentiles of the means of equally long parts, so that one slow step has little effect."""
    size = max(1, len(seconds) // _STRETCHES)
    count = len(seconds) // size
    newest = list(seconds)[-size * count :]
    means = [statistics.fmean(newest[begin : begin + size]) for begin in range(0, len(newest), size)]
    tenths = statistics.quantiles(means, n=10, method="inclusive") if len(means) > 1 else means
    mean = statistics.fmean(seconds)
    return Range(mean, min(mean, tenths[0]), max(mean, tenths[-1]))


def _number(value: object) -> float:
    return float(value) if isinstance(value, float | int) and math.isfinite(value) else math.nan


def _or_zero(value: object) -> float:
    number = _number(value)
    return 0.0 if math.isnan(number) else number
