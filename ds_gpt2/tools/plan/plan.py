"""What is planned, and how a plan is told: rows of words, each with its figures and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.pace import Range
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.resources.memory_model import Model, Zero
from ds_gpt2.tools.resources.run_schedule import RunSchedule

# exact: arithmetic on the settings; measured: on this machine, by the trial; predicted: by formulas, or from what was
# measured to what was not run; estimated: with figures of another machine or run.
Basis = Literal["exact", "measured", "predicted", "estimated", "not known"]
Value = int | float | str | Range | None


@dataclass(frozen=True)
class Hardware:
    """GPUs that are not here."""

    flops: float  # of one at most, dense bf16, a second
    memory: int  # bytes of one


@dataclass(frozen=True)
class Subject:
    """What is planned, and what there is for it."""

    settings: Settings
    batch: BatchPlan
    place: RankLayout
    model: Model
    zero: Zero
    schedule: RunSchedule | None  # None: the steps follow from data that is not there yet
    disk_free: int  # bytes for checkpoints, those that the run already has included
    memory_free: int | None  # bytes for one rank, of its GPU or its share of the host; None where not known
    elsewhere: Hardware | None = None  # the run is to be on other GPUs than this machine's
    disk_given: bool = False  # that disk is not this machine's either
    no_data: str | None = None  # why the data cannot be read yet

    @property
    def on_cpu(self) -> bool:
        return self.place.accelerator == "cpu"


@dataclass(frozen=True)
class PlanRow:
    """One line for a person, the same as figures for a program; their names end in their unit."""

    label: str
    text: str
    basis: Basis
    figures: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    title: str
    rows: Sequence[PlanRow]
