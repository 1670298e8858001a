"""What another schedule means for the learning rate of a run that resumes."""

from __future__ import annotations

from collections.abc import Sequence

from ds_gpt2.training.lr_schedule import LearningRate

_WIDTH, _HEIGHT = 64, 8  # characters
_BEFORE, _NOW, _BOTH = ".+*"


def describe_change(before: LearningRate, now: LearningRate, step: int) -> list[str]:
    """Return what changes for a run that resumes at ``step``, as text with a plot; nothing if no update changes."""
    first = step + 1
    to_come = [each for each in _columns(now.steps) if each > step]
    if now.steps == before.steps and all(before(each) == now(each) for each in to_come):
        return []
    if step >= now.steps:
        return []
    was = f"was {before(first):.3g}" if first <= before.steps else f"the run ended at step {before.steps:,}"
    last = f"{now(now.steps):.3g} at the last step, {now.steps:,}"
    return [
        f"learning rate: {before(step):.3g} at step {step:,}; now {now(first):.3g} at step {first:,} ({was}) and"
        f" {last} (was {before(before.steps):.3g} at step {before.steps:,})",
        *_plot(before, now, step),
    ]


def _plot(before: LearningRate, now: LearningRate, step: int) -> list[str]:
    """Return a plot of both curves over the steps of the longer run; ASCII, for every terminal."""
    longest = max(now.steps, before.steps)
    columns = _columns(longest)
    old = [before(each) if each <= before.steps else None for each in columns]
    new = [now(each) if step < each <= now.steps else None for each in columns]
    top = max(rate for rate in (*old, *new) if rate is not None)
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for column, rates in enumerate(zip(old, new, strict=True)):
        _draw(rows, column, rates, top)
    labels = [f"{top:.2g}", *[""] * (_HEIGHT - 2), "0"]
    lines = [f"{label:>8} |{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    mark = round(step / longest * (_WIDTH - 1))
    axis = "-" * mark + "^" + "-" * (_WIDTH - 1 - mark)
    legend = f"steps 1 to {longest:,}; ^ resumes here; {_BEFORE} before, {_NOW} now, {_BOTH} both"
    return [*lines, f"{'':>8} +{axis}", f"{'':>10}{legend}"]


def _columns(steps: int) -> list[int]:
    """Return the steps that the columns of the plot show, evenly spaced from 1 to ``steps``."""
    return [1 + round(index * (steps - 1) / (_WIDTH - 1)) for index in range(_WIDTH)]


def _draw(rows: Sequence[list[str]], column: int, rates: tuple[float | None, float | None], top: float) -> None:
    for rate, sign in zip(rates, (_BEFORE, _NOW), strict=True):
        if rate is not None:
            row = rows[_HEIGHT - 1 - round(rate / top * (_HEIGHT - 1))]
            row[column] = sign if row[column] == " " else _BOTH
