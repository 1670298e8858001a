"""``drill``: inject faults into a scaled-down copy of a run and verify that it recovers."""

from __future__ import annotations

import argparse
import os
import secrets

from ds_gpt2.commands.arguments import add_start_arguments, whole_number
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.lookup import find_config
from ds_gpt2.config.settings import parse_overrides
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.launcher import choose_ranks
from ds_gpt2.tools.drill.plan import NAMES, DrillPlan
from ds_gpt2.tools.drill.record import SceneResult, header, lines_of, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in ds_configs/")
    add_start_arguments(parser)
    parser.add_argument(
        "--whole", action="store_true", help="use the full model and batch (default: scaled down, takes minutes)"
    )
    parser.add_argument("--only", metavar="NAMES", help=f"only these scenes, separated by commas: {', '.join(NAMES)}")
    parser.add_argument(
        "--seed", type=whole_number, metavar="N", help="seed of the random times and ranks of faults (default: random)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of the drill")


def run(options: argparse.Namespace) -> int:
    plan = _plan(options)
    os.environ.setdefault("DS_ACCELERATOR", plan.layout.accelerator)
    from ds_gpt2.tools.drill.drill import run_drill  # imported late: DeepSpeed selects its accelerator at import

    if not options.json:
        size = "full size" if plan.whole else "scaled down"
        ranks = counted(plan.layout.ranks, "rank")
        print(f"drill of {plan.settings.run.name}, {size}, on {ranks} ({plan.layout.accelerator})")
        print(f"to repeat it with the same fault times and ranks: --seed {plan.seed}\n\n{header()}", flush=True)
    record, folder = run_drill(plan, _quiet if options.json else _show)
    if options.json:
        print(record.to_json(), end="")
    else:
        print(f"\n{summary(record)}\nrecord: {folder / 'drill.md'}")
    return exit_codes.DONE if record.passed else exit_codes.CRASHED


def _plan(options: argparse.Namespace) -> DrillPlan:
    """Return the plan of a drill.

    Raises:
        UserError: the settings cannot train, or there is no such scene.
    """
    settings = run_location.load(find_config(options.config), parse_overrides(options.settings))
    load_deepspeed_file(settings.deepspeed)
    open_dataset(settings.data.dir)
    layout = choose_ranks(settings, options.num_gpus)
    if options.whole:
        batch = settings.batch
        plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, layout.ranks)
    names = options.only.split(",") if options.only else NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--only {','.join(unknown)}: no such scene; known are {', '.join(NAMES)}")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    return DrillPlan(settings, layout, names, options.whole, seed, options.keep)


def _show(row: SceneResult) -> None:
    print("\n".join(lines_of(row)), flush=True)


def _quiet(row: SceneResult) -> None:
    """Print nothing: the JSON at the end contains the row."""
