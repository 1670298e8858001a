"""How far a run is, how fast it goes, what it has to go; and what it has learnt."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.pace import RECENT, WINDOW, Cadence, Pace, recent, timed_of
from ds_gpt2.monitoring.reference_curves import REFERENCE_CURVE, REFERENCE_TOKENS_PER_STEP
from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.metrics import Record
from ds_gpt2.run_dir.metrics_tail import values

RECORDS = WINDOW + 50  # that are looked at: first steps of starts do not count
SMOOTHED = RECENT


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int | None
    done_share: float | None
    tokens: int  # seen in training
    epochs: float | None  # as far as recorded
    tokens_per_second: float | None  # of steps alone, median of the last 50
    step_seconds: float | None  # the same
    seconds_per_step: float | None  # wall time, evaluation and saves included, mean of the last 2,000 steps
    left_seconds: float | None  # see ds_gpt2.monitoring.pace
    left_seconds_low: float | None
    left_seconds_high: float | None


@dataclass(frozen=True)
class Loss:
    """Nats a token."""

    train: float | None  # median of the last 50 steps
    train_day_before: float | None  # the same
    val: float | None  # the newest
    val_step: int | None
    best_val: float | None
    best_val_step: int | None
    train_not_finite_step: int | None  # the newest step, if its loss is NaN or infinite
    val_not_finite_step: int | None  # of the newest validation, if its loss is NaN or infinite
    reference: float | None  # llm.c's validation loss at that step, where the run is like it


def read_pace(run_dir: Path, settings: Settings, records: Sequence[Record], starts: Sequence[int]) -> Pace:
    """The run's pace by its newest records, and by those of older evaluations and saves.

    Args:
        records: the newest ones, in a row.
        starts: the steps that the run was started from, the newest last.
    """
    cadence = Cadence.of(settings)
    pace = Pace(cadence, starts)
    if records:
        older = [step for step in cadence.occasions(records[-1]["step"]) if step < records[0]["step"]]
        for timed in timed_of(metrics_tail.at_steps(run_dir, older)):
            pace.add(timed)
    for timed in timed_of(records):
        pace.add(timed)
    return pace


def progress_of(settings: Settings, records: Sequence[Record], step: int, steps: int | None, pace: Pace) -> Progress:
    """
    Args:
        step: the newest one done.
    """
    left = None if steps is None else pace.left(step, steps)
    step_ms, wall = recent_of(records, "perf/step_ms"), pace.wall_seconds
    epochs = values(records[-SMOOTHED:], "train/epoch")
    return Progress(
        step=step,
        steps=steps,
        done_share=min(1.0, step / steps) if steps else None,
        tokens=step * settings.batch.tokens_per_step,
        epochs=epochs[-1] if epochs else None,
        tokens_per_second=recent_of(records, "perf/tokens_per_s"),
        step_seconds=None if step_ms is None else step_ms / 1000,
        seconds_per_step=wall.mean if wall else None,
        left_seconds=left.mean if left else None,
        left_seconds_low=left.low if left else None,
        left_seconds_high=left.high if left else None,
    )


def recent_of(records: Sequence[Record], tag: str) -> float | None:
    """``pace.recent`` of a metric."""
    return recent(values(records[-SMOOTHED:], tag))


def loss_of(
    records: Sequence[Record], day_before: Sequence[Record], newest: Generation | None, settings: Settings
) -> Loss:
    """
    Args:
        records: the newest ones.
        day_before: those up to a day earlier.
        newest: the newest checkpoint, which remembers a validation loss of long ago.
    """
    measured = _validations(records, newest)
    val_step, val = max(measured, default=(None, None))
    best_val, best_step = min(((loss, step) for step, loss in [*measured, *_best_of(newest)]), default=(None, None))
    return Loss(
        train=recent_of(records, "train/loss"),
        train_day_before=recent_of(day_before, "train/loss"),
        val=val,
        val_step=val_step,
        best_val=best_val,
        best_val_step=best_step,
        train_not_finite_step=_newest_if_not_finite(records, "train/loss"),
        val_not_finite_step=_newest_if_not_finite(records, "val/loss"),
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


def _newest_if_not_finite(records: Sequence[Record], tag: str) -> int | None:
    """Return the step of the newest record of a metric if its value is not finite; None if it is, or there is none."""
    newest = next((record for record in reversed(records) if tag in record), None)
    return None if newest is None or values([newest], tag) else newest["step"]


def _validations(records: Sequence[Record], newest: Generation | None) -> list[tuple[int, float]]:
    """(step, loss) of the finite ones in the records and of the newest that the checkpoint remembers."""
    recorded = [(record["step"], loss) for record in records for loss in values([record], "val/loss")]
    return [*recorded, *_remembered(newest, "val_step", "val_loss")]


def _best_of(newest: Generation | None) -> list[tuple[int, float]]:
    return _remembered(newest, "best_step", "best_val_loss")


def _remembered(newest: Generation | None, step_name: str, loss_name: str) -> list[tuple[int, float]]:
    """(step, loss) from a checkpoint's state, if there is a finite one; earlier versions could store NaN."""
    state = newest.manifest.state if newest is not None and newest.manifest is not None else {}
    step, loss = state.get(step_name), state.get(loss_name)
    return [(step, loss)] if isinstance(loss, float) and isinstance(step, int) and math.isfinite(loss) else []
