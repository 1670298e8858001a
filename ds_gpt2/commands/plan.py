"""``plan``: estimate memory, time, disk and energy of a run, from a trial of a few real steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_gpt2.commands.arguments import add_start_arguments, positive, positive_float
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.common.terminal import print_error
from ds_gpt2.config import run_location
from ds_gpt2.config.lookup import find_config
from ds_gpt2.config.settings import parse_overrides
from ds_gpt2.monitoring.pace import Range
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.plan.estimate import inputs_of, make_plan
from ds_gpt2.tools.plan.inputs import Hardware, PlanInputs
from ds_gpt2.tools.plan.plan import Plan, Value
from ds_gpt2.tools.plan.trial import LEAST_STEPS, Limits, Trial, TrialError, run_trial
from ds_gpt2.tools.plan.trial_results import TrialResults
from ds_gpt2.tools.resources.prices import Prices

WIDTH = 100  # columns

_BASIS, _LABEL = 10, 16  # columns
_TEXT = 2 + _BASIS + 1 + _LABEL  # the column at which the text begins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in ds_configs/")
    add_start_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="arithmetic only, without a trial")
    parser.add_argument(
        "--steps",
        type=positive,
        default=Limits().steps,
        metavar="N",
        help="least number of steps of the trial (default: 16)",
    )
    parser.add_argument(
        "--seconds",
        type=positive_float("--seconds"),
        default=Limits().seconds,
        metavar="S",
        help="time limit of the trial's steps (default: 120)",
    )
    parser.add_argument(
        "--tflops", type=positive_float("--tflops"), metavar="T", help="plan for other GPUs: bf16 peak of each"
    )
    parser.add_argument(
        "--gpu-memory-gb",
        type=positive_float("--gpu-memory-gb"),
        metavar="G",
        help="plan for other GPUs: memory of each; no trial is run",
    )
    parser.add_argument(
        "--disk-free-gb",
        type=positive_float("--disk-free-gb"),
        metavar="G",
        help="free disk space for the run (default: of this disk)",
    )
    parser.add_argument(
        "--watts", type=positive_float("--watts"), metavar="W", help="power of the machine (default: of its GPUs)"
    )
    parser.add_argument("--price-per-kwh", type=positive_float("--price-per-kwh"), metavar="P", help="price of energy")
    parser.add_argument(
        "--price-per-hour", type=positive_float("--price-per-hour"), metavar="P", help="price of the machine"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    config, overrides = find_config(options.config), parse_overrides(options.settings)
    settings = run_location.load(config, overrides)
    _check(options)
    prices = Prices(options.watts, options.price_per_kwh, options.price_per_hour)
    disk_free = None if options.disk_free_gb is None else int(options.disk_free_gb * 1e9)
    inputs = inputs_of(settings, options.num_gpus, _hardware(options), disk_free)
    results = None
    if not options.quick and inputs.other_hardware is None and inputs.no_data is None:
        try:
            results = _trial(config, overrides, inputs, Limits(options.steps, options.seconds))
        except TrialError as error:
            print_error(error)
            return exit_codes.CRASHED
    plan = make_plan(inputs, results, prices, time.time())
    if options.json:
        print(json.dumps(as_json(plan)))
    else:
        print("\n".join(lines_of(plan, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))))
    for problem in plan.problems:
        print_error(problem)
    return exit_codes.MISTAKE if plan.problems else exit_codes.DONE


def lines_of(plan: Plan, width: int = WIDTH) -> Iterator[str]:
    """Yield the lines of a plan, at most ``width`` columns wide."""
    inputs = plan.inputs
    where = "the CPU" if inputs.on_cpu else "other GPUs" if inputs.other_hardware else "GPUs"
    yield f"plan of {inputs.settings.run.name}: {counted(inputs.layout.ranks, 'rank')} on {where}"
    for section in plan.sections:
        yield f"\n{section.title}"
        for row in section.rows:
            head = f"  {row.basis:<{_BASIS}} {row.label:<{_LABEL}}"
            yield from textwrap.wrap(
                row.text,
                width,
                initial_indent=head,
                subsequent_indent=" " * _TEXT,
                break_on_hyphens=False,
                expand_tabs=False,
            )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan for JSON: every figure by name, with its basis."""
    inputs = plan.inputs
    figures = {
        name: {**_plain(value), "basis": row.basis}
        for section in plan.sections
        for row in section.rows
        for name, value in row.figures.items()
    }
    return {
        "run": inputs.settings.run.name,
        "accelerator": inputs.layout.accelerator,
        "fits": not plan.problems,
        "problems": list(plan.problems),
        "figures": figures,
        "options": [dataclasses.asdict(option) for option in plan.options],
    }


def _plain(value: Value) -> dict[str, Any]:
    return {"value": value.mean, "low": value.low, "high": value.high} if isinstance(value, Range) else {"value": value}


def _check(options: argparse.Namespace) -> None:
    if options.steps < LEAST_STEPS:
        raise UserError(
            f"--steps {options.steps}: must be at least {LEAST_STEPS}; --seconds limits the time of a trial"
        )


def _hardware(options: argparse.Namespace) -> Hardware | None:
    if options.tflops is None and options.gpu_memory_gb is None:
        return None
    if options.tflops is None or options.gpu_memory_gb is None:
        raise UserError("for other GPUs give both --tflops and --gpu-memory-gb, and their number with --num_gpus")
    return Hardware(options.tflops * 1e12, int(options.gpu_memory_gb * 1e9))


def _trial(config: Path, overrides: dict[str, str], inputs: PlanInputs, limits: Limits) -> TrialResults:
    try:
        return run_trial(Trial(config, overrides, inputs.settings, inputs.batch, inputs.layout, limits, _show_progress))
    finally:
        _show_progress("")


def _show_progress(text: str) -> None:
    """Show the progress of the trial on a terminal; the next line replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
