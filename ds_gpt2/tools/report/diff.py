"""Comparison of two runs: settings that differ, losses at equal numbers of tokens, final metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_gpt2.config.run_location import without_alert_command
from ds_gpt2.config.settings import Settings, flat
from ds_gpt2.tools.report.curves import Curve
from ds_gpt2.tools.report.run import Run

POINTS = 8
_IGNORED = ("run.name", "run.dir", "checkpoint.dir", "monitor.dir")  # names and directories of the runs themselves


@dataclass(frozen=True)
class Pair:
    """One value of two runs; None if a run does not have it."""

    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """b - a."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True)
class Losses:
    """Losses of both runs after each has trained on ``tokens``."""

    tokens: float
    training: Pair  # the median of the last 50 steps
    validation: Pair  # as measured at exactly that point; else None


def settings_that_differ(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the values in both runs by dotted name; names and directories of the runs are ignored."""
    first, second = (flat(without_alert_command(settings.model_dump(mode="json"))) for settings in (a, b))
    names = [name for name in first | second if name not in _IGNORED]
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def losses_at_equal_tokens(a: Run, b: Run, points: int = POINTS) -> list[Losses]:
    """Return the losses at no more than ``points`` points, evenly spread over the tokens that both runs recorded.

    If both runs have validations at equal tokens, these are the points, in addition to the last one. Nothing is
    interpolated. Of a fork and its parent, only steps that both have recorded are compared.
    """
    begin = _common_begin(a, b)
    return [
        Losses(
            float(tokens),
            Pair(*(_training(run, begin, tokens) for run in (a, b))),
            Pair(*(_validations(run).get(tokens) for run in (a, b))),
        )
        for tokens in _points(a, b, points)
    ]


def _points(a: Run, b: Run, points: int) -> list[int]:
    """Return the points in tokens, ascending."""
    last = _common_end(a, b)
    if not last:
        return []
    shared = sorted(tokens for tokens in _validations(a).keys() & _validations(b).keys() if tokens <= last)
    if not shared:
        begin = _common_begin(a, b)
        return sorted({begin + (last - begin) * number // points for number in range(1, points + 1)} - {0})
    count = points if shared[-1] == last else points - 1
    chosen = {shared[index * (len(shared) - 1) // max(1, count - 1)] for index in range(count)}
    return sorted({*chosen, last})


def _common_begin(a: Run, b: Run) -> int:
    """Return the tokens after which both runs have records: above 0 for a fork; 0 if they have none in common."""
    if not all(len(run.records.steps) for run in (a, b)):
        return 0
    begin = max(_tokens(run, int(run.records.steps[0]) - 1) for run in (a, b))
    return begin if begin < _common_end(a, b) else 0


def _common_end(a: Run, b: Run) -> int:
    """Return the tokens of the shorter run."""
    return min(_tokens(run, run.records.newest) for run in (a, b))


def _tokens(run: Run, step: int) -> int:
    """Return the tokens that ``run`` has trained on until the end of ``step``."""
    return step * run.settings.batch.tokens_per_step


def final_metrics(a: Run, b: Run) -> dict[str, Pair]:
    """Return the last value of each metric of both runs, by name."""
    begin = _common_begin(a, b)
    found = {
        "steps": Pair(float(a.last_step()), float(b.last_step())),
        "tokens": Pair(*(float(_tokens(run, run.last_step())) for run in (a, b))),
        "train/loss": Pair(*(_training(run, begin, _tokens(run, run.records.newest)) for run in (a, b))),
        "val/loss": Pair(*(run.records.curve("val/loss").last() for run in (a, b))),
        "val/loss, lowest": Pair(*(_lowest(run.records.curve("val/loss")) for run in (a, b))),
    }
    for tag in ("hellaswag/acc", "hellaswag/acc_norm"):
        found[tag] = Pair(*(run.records.curve(tag).last() for run in (a, b)))
    not_finite = [float(_count_not_finite(run.records.curve("train/loss"))) for run in (a, b)]
    if any(not_finite):
        found["training losses that are not finite"] = Pair(*not_finite)
    found["perf/tokens_per_s"] = Pair(*(run.records.curve("perf/tokens_per_s").recent() for run in (a, b)))
    return {name: pair for name, pair in found.items() if (pair.a, pair.b) != (None, None)}


def _training(run: Run, begin: int, tokens: int) -> float | None:
    """Return the recent training loss of ``run`` at ``tokens``, of steps after ``begin`` tokens."""
    per_step = run.settings.batch.tokens_per_step
    return run.records.curve("train/loss").since(begin // per_step + 1).until(tokens // per_step).recent()


def _validations(run: Run) -> dict[int, float]:
    """Return every finite validation loss, by the tokens trained on until then."""
    curve = run.records.curve("val/loss").finite()
    return {_tokens(run, step): loss for step, loss in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)}


def _count_not_finite(curve: Curve) -> int:
    """Return the number of values that are NaN or infinite."""
    return len(curve) - len(curve.finite())


def _lowest(curve: Curve) -> float | None:
    found = curve.lowest()
    return found[1] if found is not None else None
