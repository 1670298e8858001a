"""Assemble the plan of a run: what it is about, and the estimates of each section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.formatting import counted, size
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.distributed import torch_compile
from ds_gpt2.supervision.launcher import RankLayout, choose_ranks
from ds_gpt2.tools.plan import timing
from ds_gpt2.tools.plan.fit import Option, calibrate, micro_batches, other_ranks
from ds_gpt2.tools.plan.plan import Hardware, PlanRow, PlanSection, Subject
from ds_gpt2.tools.plan.sections import (
    batch_section,
    cost_section,
    disk_need,
    disk_section,
    memory_section,
    problems_of,
    time_section,
)
from ds_gpt2.tools.plan.trial_results import Traces
from ds_gpt2.tools.resources import machine
from ds_gpt2.tools.resources.checkpoint_space import own_bytes
from ds_gpt2.tools.resources.memory_model import describe_model, read_zero
from ds_gpt2.tools.resources.prices import Prices
from ds_gpt2.tools.resources.run_schedule import run_schedule_of


@dataclass(frozen=True)
class Plan:
    """The estimates for a run."""

    subject: Subject
    sections: Sequence[PlanSection]
    options: Sequence[Option]
    problems: Sequence[str]


def subject_of(
    settings: Settings, num_gpus: int | None, hardware: Hardware | None, disk_free: int | None = None
) -> Subject:
    """Return what the plan is about: the run, its ranks and the resources.

    Args:
        disk_free: bytes; None: of this machine's disk.

    Raises:
        UserError: the settings cannot train.
    """
    zero = read_zero(load_deepspeed_file(settings.deepspeed))
    layout = RankLayout("cuda", num_gpus or 1) if hardware is not None else choose_ranks(settings, num_gpus)
    batch = settings.batch
    shared = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, layout.ranks)
    windows, no_data = _windows(settings)
    compiled = torch_compile.is_enabled(settings.run.compile, layout.accelerator)
    return Subject(
        settings,
        shared,
        layout,
        describe_model(settings.model, batch.sequence_length, compiled),
        zero,
        run_schedule_of(settings, shared.windows_per_step, windows),
        disk_free=_free_for_run(settings.checkpoint_dir) if disk_free is None else disk_free,
        memory_free=hardware.memory if hardware is not None else machine.memory_per_rank(layout),
        elsewhere=hardware,
        disk_given=disk_free is not None,
        no_data=no_data,
    )


def make_plan(subject: Subject, traces: Traces | None, prices: Prices, now: float) -> Plan:
    """Return the estimates for a run.

    Args:
        traces: results of the trial; None without a trial.
        now: seconds since 1970.
    """
    calibration = calibrate(subject, traces)
    pace = timing.measured(traces) if traces is not None else None
    if subject.elsewhere is not None:
        pace = timing.estimated(subject, subject.elsewhere)
    options = [*micro_batches(subject, calibration), *other_ranks(subject, calibration)]
    sections = [
        batch_section(subject),
        memory_section(subject, traces, calibration),
        _options_section(subject, options),
        time_section(subject, pace, now),
        disk_section(subject, traces, disk_need(subject, traces)),
        cost_section(subject, pace, prices),
    ]
    return Plan(subject, sections, options, problems_of(subject, traces, calibration))


def _windows(settings: Settings) -> tuple[int | None, str | None]:
    """Return the windows of an epoch, or None and the reason if the data is not prepared yet.

    Raises:
        UserError: the data exists, but cannot be trained on.
    """
    if not settings.data.dir.is_dir() or not any(settings.data.dir.iterdir()):
        return None, f"{settings.data.dir} does not exist yet, or is empty"
    dataset = open_dataset(settings.data.dir)
    return len(Windows(dataset, "train", settings.batch.sequence_length)), None


def _free_for_run(checkpoint_dir: Path) -> int:
    """Return the free bytes on the disk of the checkpoints, including those that the run already has."""
    return machine.disk_free(checkpoint_dir) + own_bytes(checkpoint_dir)


def _options_section(subject: Subject, options: Sequence[Option]) -> PlanSection:
    return PlanSection("other divisions of the same budget", [_option_row(subject, option) for option in options])


def _option_row(subject: Subject, option: Option) -> PlanRow:
    verdicts = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}
    configured = (option.micro_batch, option.ranks) == (subject.batch.micro_batch, subject.batch.world_size)
    shared = (
        f"{counted(option.micro_batch, 'window')} x {counted(option.accumulation, 'micro-batch', 'micro-batches')}"
        f" x {counted(option.ranks, 'rank')}"
    )
    text = f"{size(option.rank_bytes):>9} per rank: {shared}; {verdicts[option.fits]}"
    text += " (as configured)" if configured else ""
    return PlanRow(f"micro-batch {option.micro_batch}", text, "predicted")
