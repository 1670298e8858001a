"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math


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
