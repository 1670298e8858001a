"""The settings of evaluations with items: published ones by name, and the user's own files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from ds_gpt2.config.field_types import Count, PositiveInt, Section

# Published evaluations, prepared by `prepare evaluation NAME`. HellaSwag has its own section.
EVALUATION_NAMES = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "copa",
    "lambada",
    "openbookqa",
    "piqa",
    "sciq",
    "winogrande",
)
EVALUATIONS_DIR = Path("data") / "evaluations"  # in the project's directory: NAME.jsonl

_MOST = 100


class EvaluationSettings(Section):
    """One evaluation during training."""

    every: Count  # steps; 0: never
    path: Path  # file of items; of a published evaluation the one that `prepare evaluation` writes
    items: PositiveInt | None = None  # number of items, from the first; None: all


def _plain_names(evaluations: dict[str, EvaluationSettings]) -> dict[str, EvaluationSettings]:
    for name in evaluations:
        check_name(name)
    return evaluations


def check_name(name: str) -> None:
    """Check the name of an evaluation, which is a part of the names of its metrics.

    Raises:
        ValueError: it has other characters.
    """
    if not re.fullmatch(r"[a-z0-9_]{1,50}", name):
        raise ValueError(f"evaluations.{name[:60]}: a name has only lower-case letters, digits and '_' (at most 50)")


Evaluations = Annotated[dict[str, EvaluationSettings], Field(max_length=_MOST), AfterValidator(_plain_names)]


def default_path(name: str, project_dir: Path) -> Path | None:
    """Return the file of a published evaluation; None for another name."""
    return project_dir / EVALUATIONS_DIR / f"{name}.jsonl" if name in EVALUATION_NAMES else None
