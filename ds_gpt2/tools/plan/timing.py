"""Predict the duration of a run from the steps, evaluations and saves of the trial, and how often each occurs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ds_gpt2.monitoring.pace import Range
from ds_gpt2.tools.plan.inputs import Hardware, PlanInputs
from ds_gpt2.tools.plan.plan import Basis
from ds_gpt2.tools.plan.trial_results import SaveCost, TrialResults
from ds_gpt2.tools.resources.run_schedule import RunSchedule

_MFU = Range(0.35, 0.5, 0.25)  # assumed for other GPUs; nanoGPT and llm.c have reported such values for GPT-2


@dataclass(frozen=True)
class Timing:
    """The durations of the parts of a run."""

    step: Range  # seconds of training alone: mean, 10th and 90th percentile
    basis: Basis
    start: float = 0.0  # seconds from the start of the ranks to the end of the first step
    costs: Mapping[str, float] | None = None  # seconds of one evaluation of each kind; None if not measured
    save: SaveCost | None = None
    watts: float | None = None  # of the GPUs
    mfu: float | None = None

    def save_seconds(self, every: int) -> float:
        """Return the seconds that a save costs training. The next save waits until the previous one is written.

        Args:
            every: steps between two saves.
        """
        if self.save is None:
            return 0.0
        waiting = max(0.0, self.save.write_seconds - every * self.step.mean)
        return self.save.blocked_seconds + self.save.slowdown_seconds + waiting

    def run_seconds(self, schedule: RunSchedule, evaluation_counts: Mapping[str, int], saves: int) -> Range:
        """Return the seconds of the whole run. What was not measured counts as 0 s.

        Args:
            evaluation_counts: number of evaluations of each kind.
            saves: number of saves.
        """
        costs = self.costs or {}
        other_seconds = self.start + saves * self.save_seconds(schedule.save_every)
        other_seconds += sum(count * costs.get(name, 0.0) for name, count in evaluation_counts.items())
        steps = self.step.times(schedule.steps)
        return Range(steps.mean + other_seconds, steps.low + other_seconds, steps.high + other_seconds)


def measured(results: TrialResults) -> Timing:
    """Return the durations that a trial has measured."""
    low, high = np.percentile(results.step_seconds, [10, 90])
    step = Range(float(np.mean(results.step_seconds)), float(low), float(high))
    return Timing(step, "measured", results.start_seconds, results.costs, results.save, results.watts, results.mfu)


def estimated(inputs: PlanInputs, hardware: Hardware) -> Timing:
    """Return the durations for other GPUs, from the FLOPs of a step and an assumed model FLOPs utilization (MFU)."""
    flops = inputs.model.flops_per_token * inputs.batch.tokens_per_step
    ideal = flops / (hardware.flops * inputs.batch.world_size)
    step = Range(ideal / _MFU.mean, ideal / _MFU.low, ideal / _MFU.high)
    return Timing(step, "estimated", mfu=_MFU.mean)
