"""``drill``: inject faults into a scaled-down copy of a run and verify that it recovers."""

from __future__ import annotations

import argparse
import os
import secrets

from ds_gpt2.commands.arguments import add_hostfile_argument, add_start_arguments, whole_number, with_hostfile
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.lookup import find_config
from ds_gpt2.config.settings import parse_overrides
from ds_gpt2.data.sources import open_sources
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.cluster.setup import hosts_of
from ds_gpt2.supervision.launcher import RankLayout, choose_ranks, requested_accelerator
from ds_gpt2.tools.drill.plan import NAMES, DrillPlan, left_out
from ds_gpt2.tools.drill.record import SceneResult, header, lines_of, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in ds_configs/")
    add_start_arguments(parser)
    add_hostfile_argument(parser)
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
    if plan.layout.accelerator != "auto":
        os.environ.setdefault("DS_ACCELERATOR", plan.layout.accelerator)
    from ds_gpt2.tools.drill.drill import run_drill  # imported late: DeepSpeed selects its accelerator at import

    if not options.json:
        size = "full size" if plan.whole else "scaled down"
        ranks = counted(plan.layout.ranks, "rank")
        if plan.hosts:
            ranks += f" of {counted(len(plan.hosts), 'host')}"
        print(f"drill of {plan.settings.run.name}, {size}, on {ranks} ({plan.layout.accelerator})")
        print(f"to repeat it with the same fault times and ranks: --seed {plan.seed}")
        if plan.hosts and not options.only:
            for name, reason in left_out(True).items():
                print(f"left out: {name} ({reason})")
        print(f"\n{header()}", flush=True)
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
    overrides = with_hostfile(parse_overrides(options.settings), options.hostfile)
    settings = run_location.load(find_config(options.config), overrides)
    load_deepspeed_file(settings.deepspeed)
    open_sources(settings.data)
    hosts = hosts_of(settings, options.num_gpus)
    slots = sum(host.slots for host in hosts)  # with auto, the hosts decide whether they use GPUs
    layout = RankLayout(requested_accelerator(settings), slots) if hosts else choose_ranks(settings, options.num_gpus)
    if options.whole:
        batch = settings.batch
        plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, layout.ranks)
    not_possible = left_out(bool(hosts))
    names = options.only.split(",") if options.only else [name for name in NAMES if name not in not_possible]
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--only {','.join(unknown)}: no such scene; known are {', '.join(NAMES)}")
    for name in names:
        if name in not_possible:
            raise UserError(f"--only {name}: {not_possible[name]}")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    return DrillPlan(settings, layout, hosts, names, options.whole, seed, options.keep)


def _show(row: SceneResult) -> None:
    print("\n".join(lines_of(row)), flush=True)


def _quiet(row: SceneResult) -> None:
    """Print nothing: the JSON at the end contains the row."""
