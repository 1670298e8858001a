"""Curves of ``metrics.jsonl``: read them into arrays, cut, smooth and thin them without hiding spikes."""

from __future__ import annotations

import re
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

_SMOOTHING = 100  # largest number of values in a running mean

TAGS = frozenset(
    "train/loss train/lr train/grad_norm train/clipped_share train/skipped_steps train/tokens train/epoch"
    " val/loss val/loss_ema hellaswag/acc hellaswag/acc_norm hellaswag/acc_norm_stderr"
    " perf/step_ms perf/tokens_per_s perf/mfu perf/data_ms perf/forward_backward_ms perf/update_ms perf/eval_ms"
    " perf/save_ms perf/goodput perf/gpu_temperature_c perf/gpu_power_w".split()
)

# Tags with the name of a source of the data, or of an evaluation.
SOURCE_LOSS, ACCURACY = re.compile(r"val/([^/]+)/loss"), re.compile(r"eval/([^/]+)/acc")


@dataclass(frozen=True)
class Curve:
    """Values of one tag at the steps that recorded it."""

    steps: npt.NDArray[np.int64]  # (n,), ascending
    values: npt.NDArray[np.float64]  # (n,), NaN where the value was not finite

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Curve:
        is_finite = np.isfinite(self.values)
        return Curve(self.steps[is_finite], self.values[is_finite])

    def since(self, step: int) -> Curve:
        """Return the part from ``step`` on."""
        first = int(np.searchsorted(self.steps, step))
        return Curve(self.steps[first:], self.values[first:])

    def until(self, step: int) -> Curve:
        """Return the part up to and including ``step``."""
        end = int(np.searchsorted(self.steps, step, side="right"))
        return Curve(self.steps[:end], self.values[:end])

    def last(self) -> float | None:
        """Return the newest finite value; None if there is none."""
        newest = self.newest()
        return None if newest is None else newest[1]

    def newest(self) -> tuple[int, float] | None:
        """Return (step, value) of the newest finite value; None if there is none."""
        finite = self.finite()
        return (int(finite.steps[-1]), float(finite.values[-1])) if len(finite) else None

    def not_finite_at_end(self) -> int | None:
        """Return the step of the newest value if that is NaN or infinite; else None."""
        return int(self.steps[-1]) if len(self.values) and not np.isfinite(self.values[-1]) else None

    @property
    def smoothing(self) -> int:
        """Number of values in a running mean: a twentieth of the curve, at most a hundred."""
        return min(_SMOOTHING, max(1, len(self) // 20))

    def recent(self) -> float | None:
        """Return ``pace.recent`` of the newest values."""
        return recent(self.values[-RECENT:].tolist())

    def lowest(self) -> tuple[int, float] | None:
        """Return (step, value) of the smallest finite value, the first of equal ones."""
        return _extreme(self.finite(), np.argmin)

    def highest(self) -> tuple[int, float] | None:
        """Return (step, value) of the largest finite value, the first of equal ones."""
        return _extreme(self.finite(), np.argmax)


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Curves:
    """Content of ``metrics.jsonl`` for a run or a part of it."""

    steps: npt.NDArray[np.int64]  # (n,), ascending
    times: npt.NDArray[np.float64]  # (n,), when each step was recorded, seconds since 1970
    estimated: int  # number of times that are computed from later ones, because they are not recorded
    curves: dict[str, Curve]  # by tag; tags that were never recorded are missing
    samples: dict[str, dict[int, str]]  # tag to step to text
    damaged: int  # number of lines that are not records

    def curve(self, tag: str) -> Curve:
        """Return the curve of ``tag``; an empty one if it was never recorded."""
        return self.curves.get(tag, EMPTY)

    def since(self, time: float) -> Curves:
        """Return the records of ``time`` (seconds since 1970) and later."""
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
    """Read the records in ``file``; a missing file has none.

    The run may append to it at the same time: an incomplete last line does not count as damaged.
    """
    lines = _count_lines(file)
    read = 0
    steps, times = array("q"), array("d")
    columns: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
    samples: dict[str, dict[int, str]] = defaultdict(dict)
    for record in read_metrics(file):
        step = record.pop("step")
        if steps and step <= steps[-1]:
            continue  # out of order, which no run writes: counted as damaged
        read += 1
        steps.append(step)
        times.append(_number(record.pop("time", None)))
        for tag, value in record.items():
            if tag in TAGS or SOURCE_LOSS.fullmatch(tag) or ACCURACY.fullmatch(tag):
                tag_steps, values = columns[tag]
                tag_steps.append(step)
                values.append(_number(value))
            elif tag.startswith("samples/") and isinstance(value, str):
                samples[tag][step] = value
    curves = {tag: Curve(np.array(tag_steps), np.array(values)) for tag, (tag_steps, values) in columns.items()}
    known = np.array(times, np.float64)
    newest = file.stat().st_mtime if file.exists() else 0.0
    all_steps = np.array(steps, np.int64)
    filled = _fill(known, _seconds_spent(all_steps, curves), newest)
    estimated = int(np.isnan(known).sum())
    return Curves(all_steps, filled, estimated, curves, dict(samples), max(0, lines - read))


def smoothed(curve: Curve, width: int | None = None) -> Curve:
    """Return the mean of each value and the ``width - 1`` values before it; values that are not finite are skipped.

    Args:
        width: default: ``curve.smoothing``.
    """
    is_finite = np.isfinite(curve.values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(is_finite, curve.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    end = np.arange(1, len(curve) + 1)
    begin = np.maximum(0, end - (width or curve.smoothing))
    count = counts[end] - counts[begin]
    mean = (totals[end] - totals[begin]) / np.maximum(count, 1)
    return Curve(curve.steps, np.where(count > 0, mean, np.nan))


def thinned(curve: Curve, points: int = 2000) -> Curve:
    """Return at most ``points + 1`` of the curve's points.

    Each section keeps its smallest, its largest and its first non-finite value, so that no spike and no gap
    disappears. The newest point is also kept.
    """
    if len(curve) <= points:
        return curve
    kept = {len(curve) - 1}
    for section in np.array_split(np.arange(len(curve)), points // 3):
        values = curve.values[section]
        is_finite = np.isfinite(values)
        if is_finite.any():
            kept.add(int(section[np.argmin(np.where(is_finite, values, np.inf))]))
            kept.add(int(section[np.argmax(np.where(is_finite, values, -np.inf))]))
        if not is_finite.all():
            kept.add(int(section[np.argmin(is_finite)]))
    chosen = np.array(sorted(kept))
    return Curve(curve.steps[chosen], curve.values[chosen])


def mean_per_step(curve: Curve, steps: npt.NDArray[np.int64], sections: int = 100) -> Curve:
    """Return the mean cost per step of each section, including steps without a value, which cost 0.

    Args:
        steps: (n,), all steps of the run, including those that did not record the tag.
        sections: approximate number of points of the result, each at the last step of its section.
    """
    if not len(steps) or not len(curve):
        return EMPTY
    parts = [part for part in np.array_split(steps, sections) if len(part)]
    ends = np.array([part[-1] for part in parts])
    cost = curve.finite()
    totals = np.bincount(np.searchsorted(ends, cost.steps), cost.values, minlength=len(ends))
    return Curve(ends, totals / np.array([len(part) for part in parts]))


def _extreme(curve: Curve, argument: Any) -> tuple[int, float] | None:
    """Return (step, value) of the smallest or largest value; None for an empty curve.

    Args:
        argument: ``np.argmin`` or ``np.argmax``.
    """
    if not len(curve):
        return None
    index = int(argument(curve.values))
    return int(curve.steps[index]), float(curve.values[index])


def _number(value: object) -> float:
    return float(value) if isinstance(value, float | int) else np.nan


def _count_lines(file: Path) -> int:
    """Return the number of complete lines in ``file``, including empty ones."""
    if not file.exists():
        return 0
    with open(file, "rb", opener=regular_only) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _seconds_spent(steps: npt.NDArray[np.int64], curves: dict[str, Curve]) -> npt.NDArray[np.float64]:
    """Return the seconds of each step, with the evaluation and the save in its record, (steps,)."""
    spent = np.zeros(len(steps))
    for tag in ("perf/step_ms", "perf/eval_ms", "perf/save_ms"):
        cost = curves.get(tag, EMPTY).finite()
        spent[np.searchsorted(steps, cost.steps)] += cost.values / 1000
    return spent


def _fill(times: npt.NDArray[np.float64], spent: npt.NDArray[np.float64], newest: float) -> npt.NDArray[np.float64]:
    """Fill in missing times: the time of the next step that has one, minus the duration of the steps between.

    Args:
        newest: time of the last record if it has none, in seconds since 1970.
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
