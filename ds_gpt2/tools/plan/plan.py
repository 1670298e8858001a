"""The subject of a plan, and the rows of which a plan consists: text, figures, and the basis of the figures."""

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

# exact: arithmetic on the settings; measured: on this machine, by the trial; predicted: by formulas, or extrapolated
# from measurements; estimated: from figures of another machine or run.
Basis = Literal["exact", "measured", "predicted", "estimated", "not known"]
Value = int | float | str | Range | None


@dataclass(frozen=True)
class Hardware:
    """The GPUs of another machine."""

    flops: float  # peak of one GPU per second, dense bf16
    memory: int  # bytes of one GPU


@dataclass(frozen=True)
class Subject:
    """The run that is planned, and the resources that are available."""

    settings: Settings
    batch: BatchPlan
    layout: RankLayout
    model: Model
    zero: Zero
    schedule: RunSchedule | None  # None: the steps follow from data that does not exist yet
    disk_free: int  # bytes for checkpoints, including those that the run already has
    memory_free: int | None  # bytes for one rank: of its GPU, or its share of the host; None if not known
    elsewhere: Hardware | None = None  # the run is planned for the GPUs of another machine
    disk_given: bool = False  # the free disk space was given on the command line
    no_data: str | None = None  # why the data cannot be read yet

    @property
    def on_cpu(self) -> bool:
        return self.layout.accelerator == "cpu"


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
