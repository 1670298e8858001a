"""Progress of a run: steps, speed, time left, losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.pace import RECENT, WINDOW, Cadence, Pace, recent, recent_step_seconds, timed_of
from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.metrics import Record
from ds_gpt2.run_dir.metrics_tail import values
from ds_gpt2.tools.resources.losses import reference_loss

RECORDS = WINDOW + 50  # newest records that are read: the first steps of starts do not count
SMOOTHED = RECENT


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int | None
    done_share: float | None
    tokens: int  # trained on
    epochs: float | None  # as last recorded
    tokens_per_second: float | None  # training steps only, median of the last 50
    step_seconds: float | None  # the same
    seconds_per_step: float | None  # wall time, evaluation and saves included, mean of the last 2,000 steps
    left_seconds: float | None  # see ds_gpt2.monitoring.pace
    left_seconds_low: float | None
    left_seconds_high: float | None


@dataclass(frozen=True)
class Loss:
    """Losses in nats per token."""

    train: float | None  # median of the last 50 steps
    train_day_before: float | None  # the same, 24 hours before the newest record
    val: float | None  # the newest
    val_step: int | None
    best_val: float | None
    best_val_step: int | None
    train_not_finite_step: int | None  # step of the newest training loss, if that is NaN or infinite
    val_not_finite_step: int | None  # step of the newest validation loss, if that is NaN or infinite
    reference: float | None  # llm.c's validation loss at ``val_step``, for comparable runs


def read_pace(run_dir: Path, settings: Settings, records: Sequence[Record], starts: Sequence[int]) -> Pace:
    """Return the pace of a run from its newest records, and from the records of earlier evaluations and saves.

    Args:
        records: the newest records, without gaps.
        starts: the steps from which the run was started, the newest last.
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
    """Return how far a run is, how fast it trains and how long it still takes.

    Args:
        step: the last completed step.
    """
    left = None if steps is None else pace.left(step, steps)
    wall = pace.wall_seconds
    epochs = values(records[-SMOOTHED:], "train/epoch")
    return Progress(
        step=step,
        steps=steps,
        done_share=min(1.0, step / steps) if steps else None,
        tokens=step * settings.batch.tokens_per_step,
        epochs=epochs[-1] if epochs else None,
        tokens_per_second=recent_of(records, "perf/tokens_per_s"),
        step_seconds=recent_step_seconds(values(records[-SMOOTHED:], "perf/step_ms")),
        seconds_per_step=wall.mean if wall else None,
        left_seconds=left.mean if left else None,
        left_seconds_low=left.low if left else None,
        left_seconds_high=left.high if left else None,
    )


def recent_of(records: Sequence[Record], tag: str) -> float | None:
    """Return ``pace.recent`` of a metric."""
    return recent(values(records[-SMOOTHED:], tag))


def loss_of(
    records: Sequence[Record],
    day_before: Sequence[Record],
    newest: Generation | None,
    settings: Settings,
    first_step: int = 0,
) -> Loss:
    """Return the newest and the lowest losses of a run.

    Args:
        records: the newest records.
        day_before: the records before the last 24 hours.
        newest: the newest checkpoint; its state may hold a validation loss that is older than ``records``.
        first_step: of a fork, the step of the parent's checkpoint: losses from before are not the run's own.
    """
    validations = [each for each in _validations(records, newest) if each[0] >= first_step]
    bests = [each for each in [*validations, *_best_of(newest)] if each[0] >= first_step]
    val_step, val = max(validations, default=(None, None))
    best_val, best_step = min(((loss, step) for step, loss in bests), default=(None, None))
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


def _newest_if_not_finite(records: Sequence[Record], tag: str) -> int | None:
    """Return the step of the newest record of a metric if its value is not finite; None if it is, or there is none."""
    newest = next((record for record in reversed(records) if tag in record), None)
    return None if newest is None or values([newest], tag) else newest["step"]


def _validations(records: Sequence[Record], newest: Generation | None) -> list[tuple[int, float]]:
    """Return (step, loss) of the finite validation losses in the records and in the checkpoint's state."""
    recorded = [(record["step"], loss) for record in records for loss in values([record], "val/loss")]
    return [*recorded, *_saved(newest, "val_step", "val_loss")]


def _best_of(newest: Generation | None) -> list[tuple[int, float]]:
    return _saved(newest, "best_step", "best_val_loss")


def _saved(newest: Generation | None, step_name: str, loss_name: str) -> list[tuple[int, float]]:
    """Return (step, loss) from a checkpoint's state if the loss is finite; earlier versions could store NaN."""
    state = newest.manifest.state if newest is not None and newest.manifest is not None else {}
    step, loss = state.get(step_name), state.get(loss_name)
    return [(step, loss)] if isinstance(loss, float) and isinstance(step, int) and math.isfinite(loss) else []
