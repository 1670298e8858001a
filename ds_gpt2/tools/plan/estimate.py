"""Make the plan of a run: collect its inputs, and estimate each section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_gpt2.common.formatting import counted, size
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.sources import Sources, missing_directories, open_sources
from ds_gpt2.distributed import torch_compile
from ds_gpt2.supervision.launcher import RankLayout, choose_ranks
from ds_gpt2.tools.plan import timing
from ds_gpt2.tools.plan.fit import calibrate, micro_batches, other_ranks
from ds_gpt2.tools.plan.inputs import Hardware, PlanInputs
from ds_gpt2.tools.plan.plan import Option, Plan, PlanRow, PlanSection
from ds_gpt2.tools.plan.sections import (
    batch_section,
    cost_section,
    disk_need,
    disk_section,
    memory_section,
    problems_of,
    time_section,
)
from ds_gpt2.tools.plan.trial_results import TrialResults
from ds_gpt2.tools.resources import machine
from ds_gpt2.tools.resources.memory_model import describe_model, read_zero
from ds_gpt2.tools.resources.prices import Prices
from ds_gpt2.tools.resources.run_checkpoints import own_bytes
from ds_gpt2.tools.resources.run_schedule import run_schedule_of


def inputs_of(
    settings: Settings, num_gpus: int | None, hardware: Hardware | None, disk_free: int | None = None
) -> PlanInputs:
    """Return the inputs of the plan: the run, its ranks and the resources.

    Args:
        disk_free: bytes; None: of this machine's disk.

    Raises:
        UserError: the settings cannot train.
    """
    zero = read_zero(load_deepspeed_file(settings.deepspeed))
    layout = RankLayout("cuda", num_gpus or 1) if hardware is not None else choose_ranks(settings, num_gpus)
    batch = settings.batch
    batch_plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, layout.ranks)
    sources, no_data = _sources(settings)
    windows = sources.count("train", batch.sequence_length) if sources is not None else None
    compiled = torch_compile.is_enabled(settings.run.compile, layout.accelerator)
    return PlanInputs(
        settings,
        batch_plan,
        layout,
        describe_model(settings.model, batch.sequence_length, compiled, settings.ema.is_on),
        zero,
        run_schedule_of(settings, batch_plan.windows_per_step, windows),
        disk_free=_free_for_run(settings.checkpoint_dir) if disk_free is None else disk_free,
        memory_free=hardware.memory if hardware is not None else machine.memory_per_rank(layout),
        other_hardware=hardware,
        disk_given=disk_free is not None,
        sources=sources,
        no_data=no_data,
    )


def make_plan(inputs: PlanInputs, results: TrialResults | None, prices: Prices, now: float) -> Plan:
    """Return the estimates for a run.

    Args:
        results: of the trial; None without a trial.
        now: seconds since 1970.

    Raises:
        UserError: the run has too many checkpoints to simulate.
    """
    calibration = calibrate(inputs, results)
    pace = timing.measured(results) if results is not None else None
    if inputs.other_hardware is not None:
        pace = timing.estimated(inputs, inputs.other_hardware)
    options = [*micro_batches(inputs, calibration), *other_ranks(inputs, calibration)]
    sections = [
        batch_section(inputs),
        memory_section(inputs, results, calibration),
        _options_section(inputs, options),
        time_section(inputs, pace, now),
        disk_section(inputs, results, disk_need(inputs, results)),
        cost_section(inputs, pace, prices),
    ]
    return Plan(inputs, sections, options, problems_of(inputs, results, calibration))


def _sources(settings: Settings) -> tuple[Sources | None, str | None]:
    """Return the data of the run, or None and the reason if it is not prepared yet.

    Raises:
        UserError: the data exists, but cannot be trained on.
    """
    if missing := missing_directories(settings.data):
        return None, f"{missing[0]} does not exist yet, or is empty"
    return open_sources(settings.data), None


def _free_for_run(checkpoint_dir: Path) -> int:
    """Return the free bytes on the disk of the checkpoints, including those that the run already has."""
    return machine.disk_free(checkpoint_dir) + own_bytes(checkpoint_dir)


def _options_section(inputs: PlanInputs, options: Sequence[Option]) -> PlanSection:
    return PlanSection("other divisions of the same budget", [_option_row(inputs, option) for option in options])


def _option_row(inputs: PlanInputs, option: Option) -> PlanRow:
    verdicts = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}
    configured = (option.micro_batch, option.ranks) == (inputs.batch.micro_batch, inputs.batch.world_size)
    division = (
        f"{counted(option.micro_batch, 'window')} x {counted(option.accumulation, 'micro-batch', 'micro-batches')}"
        f" x {counted(option.ranks, 'rank')}"
    )
    text = f"{size(option.rank_bytes):>9} per rank: {division}; {verdicts[option.fits]}"
    text += " (as configured)" if configured else ""
    return PlanRow(f"micro-batch {option.micro_batch}", text, "predicted")
