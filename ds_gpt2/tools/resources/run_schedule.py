"""Schedule of a run: the steps at which it evaluates, saves and completes an epoch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ds_gpt2.config.batch_plan import steps_of
from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.pace import evaluation_intervals


@dataclass(frozen=True)
class RunSchedule:
    """Schedule of a whole run, from its first step."""

    steps: int
    windows_per_step: int
    windows_per_epoch: int | None  # None: the data does not exist yet
    validation_every: int  # steps; 0: never
    save_every: int  # steps

    @property
    def epochs(self) -> float | None:
        return None if self.windows_per_epoch is None else self.steps * self.windows_per_step / self.windows_per_epoch

    @property
    def epoch_ends(self) -> list[int]:
        """The step that completes each epoch; empty if the data does not exist yet."""
        if self.windows_per_epoch is None:
            return []
        whole = self.steps * self.windows_per_step // self.windows_per_epoch
        return [math.ceil(epoch * self.windows_per_epoch / self.windows_per_step) for epoch in range(1, whole + 1)]

    @property
    def validations(self) -> list[int]:
        """The steps that are followed by a validation."""
        return Every(self.validation_every).due_steps(self.steps)

    def saves(self, best: Collection[int]) -> list[int]:
        """Return the steps that are followed by a save.

        Args:
            best: the steps whose validation loss is the best so far.
        """
        return sorted({*Every(self.save_every).due_steps(self.steps), *self.epoch_ends, *best})


def run_schedule_of(settings: Settings, windows_per_step: int, windows_per_epoch: int | None) -> RunSchedule | None:
    """Return the schedule that ``settings`` define; None if the steps follow from epochs of data that is missing.

    Args:
        windows_per_epoch: None if the data does not exist yet.
    """
    schedule = settings.schedule
    if schedule.steps is None and windows_per_epoch is None:
        return None
    steps = steps_of(schedule, windows_per_epoch or 0, windows_per_step)
    every = settings.checkpoint.every or steps
    return RunSchedule(steps, windows_per_step, windows_per_epoch, settings.validation.every, every)


def evaluation_counts(settings: Settings, steps: int) -> dict[str, int]:
    """Return the number of evaluations of each kind of ``evaluation_intervals``."""
    return {name: len(Every(every).due_steps(steps)) for name, every in evaluation_intervals(settings).items()}
