"""Two runs side by side: what was set otherwise, and their losses where both had seen as many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_gpt2.config.run_location import without_secrets
from ds_gpt2.config.settings import Settings, flat
from ds_gpt2.tools.report.curves import Curve
from ds_gpt2.tools.report.run import Run

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
    training: Pair  # the median of the last 50 steps
    validation: Pair  # as measured at that very point, or None


def settings_that_differ(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted name to both values; names and places of the runs themselves are left out."""
    one, other = (flat(without_secrets(settings.model_dump(mode="json"))) for settings in (a, b))
    names = [name for name in one | other if name not in _LEFT_OUT]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def losses_at_equal_tokens(a: Run, b: Run, points: int = POINTS) -> list[Losses]:
    """At so many points at most, evenly spread up to where the shorter of the runs has come.

    These are points at which both runs were validated, if there are any, and the furthest one. Nothing is interpolated.
    """
    return [
        Losses(
            float(tokens),
            Pair(*(_training(run, tokens) for run in (a, b))),
            Pair(*(_validations(run).get(tokens) for run in (a, b))),
        )
        for tokens in _points(a, b, points)
    ]


def _points(a: Run, b: Run, points: int) -> list[int]:
    """Tokens, ascending."""
    furthest = min(_tokens(run, run.records.newest) for run in (a, b))
    if not furthest:
        return []
    both = sorted(tokens for tokens in _validations(a).keys() & _validations(b).keys() if tokens <= furthest)
    if not both:
        return sorted({furthest * number // points for number in range(1, points + 1)} - {0})
    count = points if both[-1] == furthest else points - 1
    chosen = {both[place * (len(both) - 1) // max(1, count - 1)] for place in range(count)}
    return sorted({*chosen, furthest})


def _tokens(run: Run, step: int) -> int:
    """Tokens that ``run`` has trained on after ``step``."""
    return step * run.settings.batch.tokens_per_step


def ends(a: Run, b: Run) -> dict[str, Pair]:
    """What each run has come to, by name."""
    found = {
        "steps": Pair(float(a.records.newest), float(b.records.newest)),
        "tokens": Pair(*(float(_tokens(run, run.records.newest)) for run in (a, b))),
        "train/loss": Pair(*(run.records.curve("train/loss").recent() for run in (a, b))),
        "val/loss": Pair(*(run.records.curve("val/loss").last() for run in (a, b))),
        "val/loss, lowest": Pair(*(_lowest(run.records.curve("val/loss")) for run in (a, b))),
    }
    for tag in ("hellaswag/acc", "hellaswag/acc_norm"):
        found[tag] = Pair(*(run.records.curve(tag).last() for run in (a, b)))
    spoilt = [float(_not_finite(run.records.curve("train/loss"))) for run in (a, b)]
    if any(spoilt):
        found["training losses that are not finite"] = Pair(*spoilt)
    found["perf/tokens_per_s"] = Pair(*(run.records.curve("perf/tokens_per_s").recent() for run in (a, b)))
    return {name: pair for name, pair in found.items() if (pair.a, pair.b) != (None, None)}


def _training(run: Run, tokens: int) -> float | None:
    return run.records.curve("train/loss").until(tokens // run.settings.batch.tokens_per_step).recent()


def _validations(run: Run) -> dict[int, float]:
    """Every finite validation loss, by the tokens trained on until then."""
    curve = run.records.curve("val/loss").finite()
    return {_tokens(run, step): loss for step, loss in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)}


def _not_finite(curve: Curve) -> int:
    """How many values are NaN or infinite."""
    return len(curve) - len(curve.finite())


def _lowest(curve: Curve) -> float | None:
    found = curve.lowest()
    return found[1] if found is not None else None
