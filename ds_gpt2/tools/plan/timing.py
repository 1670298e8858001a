"""How long a run takes: measured steps, evaluations and saves, each as often as the run will have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ds_gpt2.monitoring.pace import Range
from ds_gpt2.tools.plan.plan import Basis, Hardware, Subject
from ds_gpt2.tools.plan.trial_results import SaveCost, Traces
from ds_gpt2.tools.resources.run_schedule import RunSchedule

_MFU = Range(0.35, 0.5, 0.25)  # of GPUs that are not here; nanoGPT and llm.c have reported such shares for GPT-2


@dataclass(frozen=True)
class Timing:
    """What takes time."""

    step: Range  # seconds of training alone: the mean, and the 10th and 90th percentile
    basis: Basis
    start: float = 0.0  # seconds from the start of the ranks to the end of the first step
    costs: Mapping[str, float] | None = None  # seconds of one evaluation of each kind; None where not measured
    save: SaveCost | None = None
    watts: float | None = None  # of the GPUs
    mfu: float | None = None

    def save_seconds(self, every: int) -> float:
        """What a save costs training: where writing takes longer than the steps up to the next, that one waits."""
        if self.save is None:
            return 0.0
        waiting = max(0.0, self.save.write_seconds - every * self.step.mean)
        return self.save.held_seconds + self.save.slower_seconds + waiting

    def run_seconds(self, schedule: RunSchedule, occasions: Mapping[str, int], saves: int) -> Range:
        """Of the whole run. What was not measured counts as 0 s."""
        costs = self.costs or {}
        aside = self.start + saves * self.save_seconds(schedule.save_every)
        aside += sum(count * costs.get(name, 0.0) for name, count in occasions.items())
        steps = self.step.times(schedule.steps)
        return Range(steps.mean + aside, steps.low + aside, steps.high + aside)


def measured(traces: Traces) -> Timing:
    """By a trial."""
    low, high = np.percentile(traces.step_seconds, [10, 90])
    step = Range(float(np.mean(traces.step_seconds)), float(low), float(high))
    return Timing(step, "measured", traces.start_seconds, traces.costs, traces.save, traces.watts, traces.mfu)


def estimated(subject: Subject, hardware: Hardware) -> Timing:
    """By the arithmetic of a step and the usual share of what the GPUs could do at most."""
    flops = subject.model.flops_per_token * subject.batch.tokens_per_step
    ideal = flops / (hardware.flops * subject.batch.world_size)
    step = Range(ideal / _MFU.mean, ideal / _MFU.low, ideal / _MFU.high)
    return Timing(step, "estimated", mfu=_MFU.mean)
