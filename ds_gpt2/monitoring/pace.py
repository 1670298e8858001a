"""How fast a run is, and how long it still takes: one definition, used by the console, ``status`` and ``report``.

Time left = time of a training step x steps left
          + usual time of an evaluation x evaluations left
          + usual hold of a save x saves left.
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

RECENT = 50  # steps
RECENT_LABEL = f"median of last {RECENT} steps"

WINDOW = 2000  # newest steps whose mean is the time of a step
_STRETCHES = 8  # parts of the window whose spread gives the range
_ENOUGH = 10  # steps since the newest start, from which on earlier ones do not count
_USUAL = 5  # newest evaluations or saves whose median is their usual time
_LOOK_BACK = 64  # multiples of a cadence that are searched for an evaluation of exactly these kinds

_Kinds = frozenset[str]


def recent(values: Sequence[float | None]) -> float | None:
    """Return the median of the finite ones among the newest ``RECENT`` values of a metric; None if there is none.

    This is "the" training loss, tokens/s, gradient norm or time of a step wherever one figure is shown.
    """
    finite = [value for value in values[-RECENT:] if value is not None and math.isfinite(value)]
    return statistics.median(finite) if finite else None


@dataclass(frozen=True)
class Range:
    """A mean, and the 10th and 90th percentile around it."""

    mean: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.mean * factor, self.low * factor, self.high * factor)


class Timed(NamedTuple):
    """What one record tells about time, in seconds. Evaluation and save took place after the step before it."""

    step: int
    train: float
    evaluation: float
    save: float


def timed_of(records: Iterable[Mapping[str, Any]]) -> Iterator[Timed]:
    """Yield the times of records in ascending order of steps.

    Where a record has no ``perf/step_ms``, the time since the record before it counts.
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
    """How often a run evaluates and saves."""

    evaluations: Mapping[str, int]  # kind to steps between two, above 0
    save: int  # steps; 0: at the last step alone

    @classmethod
    def of(cls, settings: Settings) -> Cadence:
        found = {name: getattr(settings, name).every for name in EVALUATIONS}
        return cls({name: every for name, every in found.items() if every}, settings.checkpoint.every)

    def due(self, step: int) -> _Kinds:
        """Return the kinds of evaluation that follow ``step``, unless it is the last one."""
        return frozenset(name for name, every in self.evaluations.items() if step % every == 0)

    def evaluations_left(self, step: int, steps: int) -> dict[_Kinds, int]:
        """Return how often exactly these kinds come together after ``step``; at the last step all do."""
        if step >= steps or not self.evaluations:
            return {}
        exactly: dict[_Kinds, int] = {}
        for kinds, every in self._together.items():
            count = (steps - 1) // every - step // every
            exactly[kinds] = count - sum(other for larger, other in exactly.items() if kinds < larger)
        exactly[frozenset(self.evaluations)] += 1
        return {kinds: count for kinds, count in exactly.items() if count}

    def saves_left(self, step: int, steps: int) -> int:
        """Return how many saves come after ``step``; the last step is always saved."""
        if step >= steps:
            return 0
        return 1 + ((steps - 1) // self.save - step // self.save if self.save else 0)

    def occasions(self, step: int) -> list[int]:
        """Return the steps of the records that tell what the newest evaluations and saves up to ``step`` took."""
        found = {place for kinds in self._together for place in self._newest_of(kinds, step)}
        if self.save:
            newest = (step - 1) // self.save
            found |= {number * self.save for number in range(max(1, newest - _USUAL + 1), newest + 1)}
        return sorted(place + 1 for place in found)

    def _newest_of(self, kinds: _Kinds, step: int) -> list[int]:
        every = self._together[kinds]
        newest = (step - 1) // every
        places = (number * every for number in range(newest, max(0, newest - _LOOK_BACK), -1))
        return list(itertools.islice((place for place in places if self.due(place) == kinds), _USUAL))

    @functools.cached_property
    def _together(self) -> dict[_Kinds, int]:
        """Every combination of kinds, the largest first, and how many steps lie between two of its occasions."""
        names = tuple(self.evaluations)
        sizes = range(len(names), 0, -1)
        chosen = (part for size in sizes for part in itertools.combinations(names, size))
        return {frozenset(part): math.lcm(*(self.evaluations[name] for name in part)) for part in chosen}


class _Step(NamedTuple):
    step: int
    train: float
    aside: float  # evaluation and save
    off_cadence: bool  # a save that was not due by the cadence: a best checkpoint, the end of an epoch


class Pace:
    """The pace of one run. Add the times of its records in ascending order of steps.

    The first step of a start does not count: it may compile, and what lies before it is not of this process.
    """

    def __init__(self, cadence: Cadence, starts: Sequence[int]) -> None:
        """
        Args:
            starts: the steps that the run was started from, the newest last.
        """
        self._cadence = cadence
        self._first_steps = {step + 1 for step in starts}
        self._newest_start = starts[-1] if starts else 0
        self._steps: deque[_Step] = deque()
        self._all, self._fresh = _Sum(), _Sum()  # of these steps, and of those among them since the newest start
        self._off_cadence = 0  # saves among them
        self._first: float | None = None  # seconds of the newest first step: better than nothing
        self._evaluations: dict[_Kinds, deque[float]] = {}
        self._saves: deque[float] = deque(maxlen=_USUAL)

    def add(self, one: Timed) -> None:
        if one.step in self._first_steps:
            self._first = one.train
            return
        kinds = self._cadence.due(one.step - 1)
        if kinds and one.evaluation:
            self._evaluations.setdefault(kinds, deque(maxlen=_USUAL)).append(one.evaluation)
        if one.save:
            self._saves.append(one.save)
        small = 0.0 if kinds else one.evaluation  # what every step has, such as its line in the log
        off_cadence = bool(one.save) and (not self._cadence.save or (one.step - 1) % self._cadence.save != 0)
        self._count(_Step(one.step, one.train + small, one.evaluation - small + one.save, off_cadence), 1)

    @property
    def step_seconds(self) -> Range | None:
        """Seconds of a training step alone; None where no step is known."""
        counted = self._counted()
        if not counted:
            return None if self._first is None else Range(self._first, self._first, self._first)
        return _range([each.train for each in counted])

    @property
    def wall_seconds(self) -> Range | None:
        """Seconds from one step to the next of late, evaluation and saves included."""
        counted = self._counted()
        return _range([each.train + each.aside for each in counted]) if counted else self.step_seconds

    def mean_step_seconds(self) -> float | None:
        """Return the mean of ``step_seconds`` without its range: microseconds, as the console asks at every step."""
        counted = self._fresh if self._is_fresh() else self._all
        return counted.seconds / counted.steps if counted.steps else self._first

    def left(self, step: int, steps: int) -> Range | None:
        """Return the seconds from the end of ``step`` to the end of ``steps``; None where no step is known."""
        pace, aside = self.step_seconds, self._aside_left(step, steps)
        if pace is None:
            return None
        alone = pace.times(max(0, steps - step))
        return Range(alone.mean + aside, alone.low + aside, alone.high + aside)

    def mean_left(self, step: int, steps: int) -> float | None:
        """Return the mean of ``left`` without its range, see ``mean_step_seconds``."""
        mean = self.mean_step_seconds()
        return None if mean is None else max(0, steps - step) * mean + self._aside_left(step, steps)

    def _aside_left(self, step: int, steps: int) -> float:
        """Seconds of the evaluations and saves that are left; what has not been seen yet counts as nothing."""
        left = self._cadence.evaluations_left(step, steps)
        seconds = sum(count * self._evaluation_seconds(kinds) for kinds, count in left.items())
        if self._saves:
            off_cadence = self._off_cadence / max(1, len(self._steps)) * max(0, steps - step)
            seconds += (self._cadence.saves_left(step, steps) + off_cadence) * statistics.median(self._saves)
        return seconds

    def _evaluation_seconds(self, kinds: _Kinds) -> float:
        """The usual time of these kinds together; as long as that is not known, from smaller groups or a larger one."""
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
        """Put ``step`` into the window, or take it out."""
        if sign == 1:
            self._steps.append(step)
            if len(self._steps) > WINDOW:
                self._count(self._steps.popleft(), -1)
        self._all.add(step, sign)
        if step.step > self._newest_start:
            self._fresh.add(step, sign)
        self._off_cadence += sign * step.off_cadence

    def _counted(self) -> list[_Step]:
        """The steps since the newest start, which may have other ranks; before there are enough of them all."""
        if not self._is_fresh():
            return list(self._steps)
        return [each for each in self._steps if each.step > self._newest_start]

    def _is_fresh(self) -> bool:
        return self._fresh.steps >= _ENOUGH


class _Sum:
    """Seconds of training of so many steps."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def add(self, step: _Step, sign: Literal[1, -1]) -> None:
        self.seconds += sign * step.train
        self.steps += sign


def _range(seconds: Sequence[float]) -> Range:
    """The mean, and the percentiles of the means of equally long stretches, so that one slow step is no range."""
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
