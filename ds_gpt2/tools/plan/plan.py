"""A plan: rows of text and figures in sections, each with the basis of its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ds_gpt2.monitoring.pace import Range
from ds_gpt2.tools.plan.inputs import PlanInputs

# exact: arithmetic on the settings; measured: on this machine, by the trial; predicted: by formulas, or extrapolated
# from measurements; estimated: from figures of another machine or run.
Basis = Literal["exact", "measured", "predicted", "estimated", "not known"]
Value = int | float | str | Range | None


@dataclass(frozen=True)
class PlanRow:
    """One line to print, and the same as figures for programs; the name of a figure ends in its unit."""

    label: str
    text: str
    basis: Basis
    figures: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanSection:
    title: str
    rows: Sequence[PlanRow]


@dataclass(frozen=True)
class Option:
    """A division of the token budget into micro-batches and ranks."""

    micro_batch: int
    accumulation: int
    ranks: int
    rank_bytes: int
    fits: bool | None  # None: not known


@dataclass(frozen=True)
class Plan:
    """The estimates for a run."""

    inputs: PlanInputs
    sections: Sequence[PlanSection]
    options: Sequence[Option]
    problems: Sequence[str]  # reasons why the run is not possible, each with a fix
