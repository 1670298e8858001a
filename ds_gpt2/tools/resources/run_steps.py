"""Number of steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ds_gpt2.config.settings import ScheduleSettings
from ds_gpt2.run_dir.metrics import Record


def total_steps(schedule: ScheduleSettings, planned: int | None, epochs_per_step: float | None) -> int | None:
    """Return the steps of the whole run; None if they follow from the data and nothing is recorded yet.

    Args:
        planned: the steps that the newest start recorded; the settings may have been edited since.
        epochs_per_step: see the function ``epochs_per_step``.
    """
    if planned is not None:
        return planned
    if schedule.steps is not None or epochs_per_step is None or schedule.epochs is None:
        return schedule.steps
    return math.ceil(schedule.epochs / epochs_per_step - 1e-6)  # as batch_plan.steps_of; recorded epochs are rounded


def epochs_per_step(records: Sequence[Record]) -> float | None:
    """Return the epochs per step from the newest record that has an epoch; None if there is none."""
    for record in reversed(records):
        epoch = record.get("train/epoch")
        if isinstance(epoch, float | int) and epoch > 0 and record["step"] > 0:
            return float(epoch) / record["step"]
    return None
