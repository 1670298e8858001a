"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_gpt2.config.batch_plan import decay_steps_of
from ds_gpt2.config.sections import ScheduleSettings

# How the part of max_lr - min_lr that is left falls from 1 to 0 while the progress of the decay rises from 0 to 1.
_DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),  # Haegele et al. 2024, equation 1: "1-sqrt"
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),  # Loshchilov and Hutter 2017, equation 5
}


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of a run of ``steps`` steps: linear warm-up, then ``max_lr``, then a decay to ``min_lr``.

    ``cosine`` and ``linear`` decay from the end of the warm-up to the end of the run, ``wsd`` (warm-up, stable, decay;
    Hu et al. 2024) in the last steps, ``constant`` never.

    Updates are numbered as in build-nanogpt's ``get_lr``: update 1 uses ``max_lr / warmup_steps``, the first update of
    the decay still ``max_lr``; from update ``steps + 1`` on it is ``min_lr``.
    """

    schedule: ScheduleSettings
    steps: int  # of the whole run

    def __call__(self, step: int) -> float:
        """Return the learning rate of update ``step`` (1-based)."""
        schedule, done = self.schedule, step - 1
        if done < schedule.warmup_steps:
            return schedule.max_lr * (done + 1) / schedule.warmup_steps
        decay_steps = decay_steps_of(schedule, self.steps)
        begin = self.steps - decay_steps  # of the decay, in completed updates
        if done < begin or schedule.shape == "constant":
            return schedule.max_lr
        if done >= self.steps:
            return schedule.min_lr
        left = _DECAYS[schedule.decay_curve]((done - begin) / decay_steps)
        return schedule.min_lr + left * (schedule.max_lr - schedule.min_lr)
