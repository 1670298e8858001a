"""When an event is due, and the learning rate: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """An interval in steps; 0 means never."""

    steps: int

    def due(self, step: int, last_step: int) -> bool:
        """Return True at every multiple of ``steps`` and at the last step of the run."""
        return self.steps > 0 and (step % self.steps == 0 or step == last_step)


def learning_rate(step: int, *, steps: int, warmup_steps: int, max_lr: float, min_lr: float) -> float:
    """Return the learning rate of update ``step`` (1-based): linear warm-up, then a half cosine to ``min_lr``.

    The curve of GPT-3 (Brown et al. 2020, appendix B) as build-nanogpt's ``get_lr`` numbers it: update 1 uses
    ``max_lr / warmup_steps``; from update ``steps + 1`` on it is ``min_lr``.
    """
    done = step - 1
    if done < warmup_steps:
        return max_lr * (done + 1) / warmup_steps
    if done >= steps:
        return min_lr
    progress = (done - warmup_steps) / (steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (max_lr - min_lr)
