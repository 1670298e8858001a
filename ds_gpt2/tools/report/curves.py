"""The curves in ``metrics.jsonl``: read into arrays, cut to a window, smoothed, thinned without hiding a spike."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_gpt2.common.files import regular_only
from ds_gpt2.monitoring.pace import RECENT, recent
from ds_gpt2.run_dir.metrics import read_metrics

_SMOOTHING = 100  # values that a mean is taken over, at most

TAGS = frozenset(
    "train/loss train/lr train/grad_norm train/clipped_share train/skipped_steps train/tokens train/epoch"
    " val/loss hellaswag/acc hellaswag/acc_norm hellaswag/acc_norm_stderr"
    " perf/step_ms perf/tokens_per_s perf/mfu perf/data_ms perf/forward_backward_ms perf/update_ms perf/eval_ms"
    " perf/save_ms perf/goodput perf/gpu_temperature_c perf/gpu_power_w".split()
)


@dataclass(frozen=True)
class Curve:
    """What one tag was at the steps that recorded it."""

    steps: npt.NDArray[np.int64]  # (n,), ascending
    values: npt.NDArray[np.float64]  # (n,), NaN where it was infinite or none

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Curve:
        good = np.isfinite(self.values)
        return Curve(self.steps[good], self.values[good])

    def since(self, step: int) -> Curve:
        """From ``step`` on."""
        first = int(np.searchsorted(self.steps, step))
        return Curve(self.steps[first:], self.values[first:])

    def until(self, step: int) -> Curve:
        """Up to ``step``, itself included."""
        end = int(np.searchsorted(self.steps, step, side="right"))
        return Curve(self.steps[:end], self.values[:end])

    def last(self) -> float | None:
        """The newest finite value."""
        values = self.finite().values
        return float(values[-1]) if len(values) else None

    def not_finite_at_end(self) -> int | None:
        """The step of the newest value if that is NaN or infinite."""
        return int(self.steps[-1]) if len(self.values) and not np.isfinite(self.values[-1]) else None

    @property
    def smoothing(self) -> int:
        """How many values a mean is to be taken over: a twentieth of the curve, a hundred at most."""
        return min(_SMOOTHING, max(1, len(self) // 20))

    def recent(self) -> float | None:
        """``pace.recent`` of the newest values."""
        return recent(self.values[-RECENT:].tolist())

    def lowest(self) -> tuple[int, float] | None:
        """(step, value) of the least finite value, the first of equal ones."""
        return _extreme(self.finite(), np.argmin)

    def highest(self) -> tuple[int, float] | None:
        """(step, value) of the greatest finite value, the first of equal ones."""
        return _extreme(self.finite(), np.argmax)


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Curves:
    """All that ``metrics.jsonl`` tells about a run, or about a part of it."""

    steps: npt.NDArray[np.int64]  # (n,), ascending
    times: npt.NDArray[np.float64]  # (n,), when each step was recorded, seconds since 1970
    estimated: int  # how many of the times are not recorded but counted back from later ones
    curves: dict[str, Curve]  # by tag; tags that were never recorded are missing
    samples: dict[str, dict[int, str]]  # tag to step to text
    damaged: int  # lines that are no record

    def curve(self, tag: str) -> Curve:
        """Empty where ``tag`` was never recorded."""
        return self.curves.get(tag, EMPTY)

    def since(self, time: float) -> Curves:
        """What was recorded at ``time`` and later."""
        kept = self.times >= time
        first = int(self.steps[kept][0]) if kept.any() else self.newest + 1
        kept = self.steps >= first
        return Curves(
            self.steps[kept],
            self.times[kept],
            min(self.estimated, int(kept.sum())),
            {tag: curve.since(first) for tag, curve in self.curves.items()},
            {tag: {step: text for step, text in texts.items() if step >= first} for tag, texts in self.samples.items()},
            self.damaged,
        )

    @property
    def newest(self) -> int:
        """The newest step; 0 if there is none."""
        return int(self.steps[-1]) if len(self.steps) else 0


def read_records(file: Path) -> Curves:
    """The records in ``file``, none if there is no file. It may grow meanwhile: a last line cut short is not damage."""
    lines = _count_lines(file)
    read = 0
    steps, times = array("q"), array("d")
    columns: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
    samples: dict[str, dict[int, str]] = defaultdict(dict)
    for record in read_metrics(file):
        step = record.pop("step")
        if steps and step <= steps[-1]:
            continue  # out of order, as no run writes them: counted as damaged
        read += 1
        steps.append(step)
        times.append(_number(record.pop("time", None)))
        for tag, value in record.items():
            if tag in TAGS:
                at, values = columns[tag]
                at.append(step)
                values.append(_number(value))
            elif tag.startswith("samples/") and isinstance(value, str):
                samples[tag][step] = value
    curves = {tag: Curve(np.array(at), np.array(values)) for tag, (at, values) in columns.items()}
    known = np.array(times, np.float64)
    newest = file.stat().st_mtime if file.exists() else 0.0
    all_steps = np.array(steps, np.int64)
    filled = _fill(known, _seconds_spent(all_steps, curves), newest)
    estimated = int(np.isnan(known).sum())
    return Curves(all_steps, filled, estimated, curves, dict(samples), max(0, lines - read))


def smoothed(curve: Curve, width: int | None = None) -> Curve:
    """The mean of each value and the ``width - 1`` before it; those that are not finite are left out.

    Args:
        width: default: ``curve.smoothing``.
    """
    good = np.isfinite(curve.values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(good, curve.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    end = np.arange(1, len(curve) + 1)
    begin = np.maximum(0, end - (width or curve.smoothing))
    count = counts[end] - counts[begin]
    mean = (totals[end] - totals[begin]) / np.maximum(count, 1)
    return Curve(curve.steps, np.where(count > 0, mean, np.nan))


def thinned(curve: Curve, points: int = 2000) -> Curve:
    """At most ``points`` and one of the curve's own points.

    Of each stretch the least, the greatest and the first that is not finite are kept, so that no spike and no gap
    disappears; and the newest point.
    """
    if len(curve) <= points:
        return curve
    kept = {len(curve) - 1}
    for stretch in np.array_split(np.arange(len(curve)), points // 3):
        values = curve.values[stretch]
        good = np.isfinite(values)
        if good.any():
            kept.add(int(stretch[np.argmin(np.where(good, values, np.inf))]))
            kept.add(int(stretch[np.argmax(np.where(good, values, -np.inf))]))
        if not good.all():
            kept.add(int(stretch[np.argmin(good)]))
    chosen = np.array(sorted(kept))
    return Curve(curve.steps[chosen], curve.values[chosen])


def mean_per_step(curve: Curve, steps: npt.NDArray[np.int64], stretches: int = 100) -> Curve:
    """What each step of a stretch cost on average, also where a few steps bear it all, as with evaluation.

    Args:
        steps: (n,), all steps of the run, among them those that did not record the tag.
        stretches: about so many points result, each at the last step of its stretch.
    """
    if not len(steps) or not len(curve):
        return EMPTY
    parts = [part for part in np.array_split(steps, stretches) if len(part)]
    ends = np.array([part[-1] for part in parts])
    cost = curve.finite()
    totals = np.bincount(np.searchsorted(ends, cost.steps), cost.values, minlength=len(ends))
    return Curve(ends, totals / np.array([len(part) for part in parts]))


def _extreme(curve: Curve, where: Any) -> tuple[int, float] | None:
    if not len(curve):
        return None
    place = int(where(curve.values))
    return int(curve.steps[place]), float(curve.values[place])


def _number(value: object) -> float:
    return float(value) if isinstance(value, float | int) else np.nan


def _count_lines(file: Path) -> int:
    """Whole lines in ``file``, empty ones too."""
    if not file.exists():
        return 0
    with open(file, "rb", opener=regular_only) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _seconds_spent(steps: npt.NDArray[np.int64], curves: dict[str, Curve]) -> npt.NDArray[np.float64]:
    """What each step and what went on beside it took, by its own record."""
    spent = np.zeros(len(steps))
    for tag in ("perf/step_ms", "perf/eval_ms", "perf/save_ms"):
        cost = curves.get(tag, EMPTY).finite()
        spent[np.searchsorted(steps, cost.steps)] += cost.values / 1000
    return spent


def _fill(times: npt.NDArray[np.float64], spent: npt.NDArray[np.float64], newest: float) -> npt.NDArray[np.float64]:
    """Where a time is not known: the time of the next step that has one, less what the steps between took.

    Args:
        newest: seconds since 1970 that stand for the last record's time if it has none.
    """
    if not np.isnan(times).any():
        return times
    filled = times.copy()
    if np.isnan(filled[-1]):
        filled[-1] = newest
    known = np.flatnonzero(~np.isnan(filled))
    following = known[np.searchsorted(known, np.arange(len(filled)))]
    passed = np.cumsum(spent)
    return np.asarray(filled[following] - (passed[following] - passed), np.float64)
