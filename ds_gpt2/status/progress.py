"""How far a run is, how fast it goes, what it has to go; and what it has learnt."""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ds_gpt2.checkpoint.generations import Generation
from ds_gpt2.config import Settings
from ds_gpt2.reference import REFERENCE_CURVE, REFERENCE_TOKENS_PER_STEP
from ds_gpt2.status.tail import Record, time_of, values

_WINDOWS, _WINDOW = 8, 250  # the pace is that of so many stretches of so many steps: they hold evaluation and saves too
RECORDS = _WINDOWS * _WINDOW + 1  # that are looked at
SMOOTHED = 50  # records of which a loss or a speed is the median


@dataclass(frozen=True)
class Pace:
    """Wall seconds a step: the mean, and the 10th and 90th percentile of stretches of late."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int | None
    done_share: float | None
    tokens_per_second: float | None  # of steps alone
    seconds_per_step: float | None  # wall time, evaluation and saves included
    left_seconds: float | None
    left_seconds_low: float | None
    left_seconds_high: float | None


@dataclass(frozen=True)
class Loss:
    """Nats a token."""

    train: float | None  # median of the newest records
    train_day_before: float | None
    val: float | None
    val_step: int | None
    reference: float | None  # llm.c's validation loss at that step, where the run is like it


def pace_of(records: Sequence[Record], started_from: Collection[int]) -> Pace | None:
    """From records in a row; what lay between two starts is left out.

    Args:
        started_from: the steps that the run has gone on from.
    """
    timed = [(record["step"], when) for record in records if (when := time_of(record)) is not None]
    first_steps = {step + 1 for step in started_from}
    seconds = [
        (now - before) / (step - earlier)
        for (earlier, before), (step, now) in itertools.pairwise(timed)
        if step > earlier and step not in first_steps
    ]
    if not seconds:
        return None
    size = min(_WINDOW, max(1, len(seconds) // _WINDOWS))
    count = min(_WINDOWS, len(seconds) // size)
    newest = seconds[-size * count :]
    means = [statistics.fmean(newest[begin : begin + size]) for begin in range(0, len(newest), size)]
    tenths = statistics.quantiles(means, n=10, method="inclusive") if count > 1 else means
    return Pace(statistics.fmean(means), tenths[0], tenths[-1])


def steps_of(settings: Settings, records: Sequence[Record]) -> int | None:
    """How many the run is to have; None where that follows from the data and nothing is recorded yet."""
    schedule = settings.schedule
    if schedule.steps is not None:
        return schedule.steps
    a_step = epochs_per_step(records)
    if a_step is None or schedule.epochs is None:
        return None
    return math.ceil(schedule.epochs / a_step - 1e-6)  # as TrainingData.steps_for


def epochs_per_step(records: Sequence[Record]) -> float | None:
    """None where nothing is recorded yet."""
    for record in reversed(records):
        epoch = record.get("train/epoch")
        if isinstance(epoch, float | int) and epoch > 0 and record["step"] > 0:
            return float(epoch) / record["step"]
    return None


def progress_of(records: Sequence[Record], step: int, steps: int | None, pace: Pace | None) -> Progress:
    """
    Args:
        step: the newest one done.
    """
    left = None if steps is None or pace is None else max(0, steps - step)
    return Progress(
        step=step,
        steps=steps,
        done_share=min(1.0, step / steps) if steps else None,
        tokens_per_second=_median(values(records[-SMOOTHED:], "perf/tokens_per_s")),
        seconds_per_step=pace.mean if pace else None,
        left_seconds=left * pace.mean if pace and left is not None else None,
        left_seconds_low=left * pace.low if pace and left is not None else None,
        left_seconds_high=left * pace.high if pace and left is not None else None,
    )


def loss_of(
    records: Sequence[Record], day_before: Sequence[Record], newest: Generation | None, settings: Settings
) -> Loss:
    """
    Args:
        records: the newest ones.
        day_before: those up to a day earlier.
        newest: the newest checkpoint, which remembers a validation loss of long ago.
    """
    val_step, val = _validation(records, newest)
    return Loss(
        train=_median(values(records[-SMOOTHED:], "train/loss")),
        train_day_before=_median(values(day_before, "train/loss")),
        val=val,
        val_step=val_step,
        reference=None if val_step is None else reference_loss(settings, val_step),
    )


def reference_loss(settings: Settings, step: int) -> float | None:
    """llm.c's, between its published steps on a line over the logarithm of the step; None where it does not apply."""
    if settings.model.preset != "124M" or settings.batch.tokens_per_step != REFERENCE_TOKENS_PER_STEP:
        return None
    steps, losses = list(REFERENCE_CURVE), list(REFERENCE_CURVE.values())
    if not steps[0] <= step <= steps[-1]:
        return None
    right = max(1, bisect.bisect_left(steps, step))
    share = math.log(step / steps[right - 1]) / math.log(steps[right] / steps[right - 1])
    return losses[right - 1] + share * (losses[right] - losses[right - 1])


def _validation(records: Sequence[Record], newest: Generation | None) -> tuple[int | None, float | None]:
    for record in reversed(records):
        if found := values([record], "val/loss"):
            return record["step"], found[0]
    state = newest.manifest.state if newest is not None and newest.manifest is not None else {}
    loss, step = state.get("val_loss"), state.get("val_step")
    return (step, loss) if isinstance(loss, float) and isinstance(step, int) and math.isfinite(loss) else (None, None)


def _median(found: Sequence[float]) -> float | None:
    return statistics.median(found) if found else None
