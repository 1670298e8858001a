"""Losses of a run: the reference run of llm.c, and warnings about values that are not finite."""

from __future__ import annotations

import bisect
import math

from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.reference_curves import REFERENCE_CURVE, is_comparable_to_reference


def reference_loss(settings: Settings, step: int) -> float | None:
    """Return the reference run's validation loss at ``step``; None if it is not comparable or not published.

    Between two published steps it is interpolated linearly over the logarithm of the step.
    """
    steps, losses = list(REFERENCE_CURVE), list(REFERENCE_CURVE.values())
    if not is_comparable_to_reference(settings) or not steps[0] <= step <= steps[-1]:
        return None
    right = max(1, bisect.bisect_left(steps, step))
    share = math.log(step / steps[right - 1]) / math.log(steps[right] / steps[right - 1])
    return losses[right - 1] + share * (losses[right] - losses[right - 1])


def not_finite_warnings(train_step: int | None, val_step: int | None) -> list[str]:
    """Return a line for each newest loss that is NaN or infinite.

    Args:
        train_step: step of the newest training loss if that is not finite; else None.
        val_step: the same for the newest validation loss.
    """
    found = (("training", train_step), ("validation", val_step))
    return [f"the newest {which} loss is NaN or infinite (step {step:,})" for which, step in found if step is not None]
