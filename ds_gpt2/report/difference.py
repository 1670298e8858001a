"""Two runs side by side: what was set otherwise, and their losses where both had seen as many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_gpt2.config import Settings, flat
from ds_gpt2.report.records import Curve
from ds_gpt2.report.run import Run

POINTS = 8
_LEFT_OUT = ("run.name", "run.dir", "checkpoint.dir", "monitor.dir")  # they differ, and mean nothing


@dataclass(frozen=True)
class Pair:
    """One number of two runs; None where a run has none."""

    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """b - a."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True)
class Losses:
    """Of both runs, when each had trained on ``tokens``."""

    tokens: float
    training: Pair  # the mean of the newest steps
    validation: Pair  # between two validations on the line from one to the other


def settings_that_differ(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted name to both values; names and places of the runs themselves are left out."""
    one, other = (flat(settings.model_dump(mode="json")) for settings in (a, b))
    names = [name for name in one | other if name not in _LEFT_OUT]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def losses_at_equal_tokens(a: Run, b: Run, points: int = POINTS) -> list[Losses]:
    """At so many places, evenly spread up to where the shorter of the runs has come."""
    furthest = min(run.records.newest * run.settings.batch.tokens_per_step for run in (a, b))
    width = min(run.records.curve("train/loss").smoothing for run in (a, b))
    return [
        Losses(
            tokens,
            Pair(*(_training(run, tokens, width) for run in (a, b))),
            Pair(*(_validation(run, tokens) for run in (a, b))),
        )
        for tokens in (furthest * number / points for number in range(1, points + 1))
        if furthest
    ]


def ends(a: Run, b: Run) -> dict[str, Pair]:
    """What each run has come to, by name."""
    found = {
        "steps": Pair(float(a.records.newest), float(b.records.newest)),
        "tokens": Pair(*(float(run.records.newest * run.settings.batch.tokens_per_step) for run in (a, b))),
        "train/loss": Pair(*(run.records.curve("train/loss").recent() for run in (a, b))),
        "val/loss": Pair(*(run.records.curve("val/loss").last() for run in (a, b))),
        "val/loss, lowest": Pair(*(_lowest(run.records.curve("val/loss")) for run in (a, b))),
    }
    for tag in ("hellaswag/acc", "hellaswag/acc_norm", "perf/tokens_per_s"):
        found[tag] = Pair(*(run.records.curve(tag).last() for run in (a, b)))
    return {name: pair for name, pair in found.items() if (pair.a, pair.b) != (None, None)}


def _training(run: Run, tokens: float, width: int) -> float | None:
    return run.records.curve("train/loss").until(int(tokens / run.settings.batch.tokens_per_step)).recent(width)


def _validation(run: Run, tokens: float) -> float | None:
    curve, step = run.records.curve("val/loss").finite(), tokens / run.settings.batch.tokens_per_step
    if not len(curve) or not curve.steps[0] <= step <= curve.steps[-1]:
        return None
    return float(np.interp(step, curve.steps, curve.values))


def _lowest(curve: Curve) -> float | None:
    found = curve.lowest()
    return found[1] if found is not None else None
