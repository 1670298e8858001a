"""Inputs of a plan: the run, its ranks, and the resources that are available."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.sources import Sources
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.resources.memory_model import Model, Zero
from ds_gpt2.tools.resources.run_schedule import RunSchedule


@dataclass(frozen=True)
class Hardware:
    """The GPUs of another machine."""

    flops: float  # peak of one GPU per second, dense bf16
    memory: int  # bytes of one GPU


@dataclass(frozen=True)
class PlanInputs:
    """The planned run, and the resources that are available."""

    settings: Settings
    batch: BatchPlan
    layout: RankLayout
    model: Model
    zero: Zero
    schedule: RunSchedule | None  # None: the steps follow from data that does not exist yet
    disk_free: int  # bytes for checkpoints, including those that the run already has
    memory_free: int | None  # bytes for one rank: of its GPU, or its share of the host; None if not known
    other_hardware: Hardware | None = None  # the GPUs of another machine, for which the run is planned
    disk_given: bool = False  # the free disk space was given on the command line
    sources: Sources | None = None  # the data; None: it cannot be read yet
    no_data: str | None = None  # why the data cannot be read yet

    @property
    def on_cpu(self) -> bool:
        return self.layout.accelerator == "cpu"
