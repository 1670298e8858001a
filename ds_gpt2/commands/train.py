"""``train`` and ``resume``: check the settings, then start the ranks under the supervisor."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ds_gpt2.commands.arguments import add_fork_argument, add_hostfile_argument, add_start_arguments, with_hostfile
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import fit_ranks, parse_batches, plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.lookup import find_config, find_run
from ds_gpt2.config.run_location import CONFIG, load_run_settings
from ds_gpt2.config.settings import Settings, parse_overrides
from ds_gpt2.monitoring import csv_monitor, tracker_checks
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.alerts import channels
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.setup import cluster_of, hosts_of
from ds_gpt2.supervision.launcher import RankLayout, choose_ranks
from ds_gpt2.supervision.other_supervisor import check_unsupervised
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.supervision.supervisor import supervise
from ds_gpt2.tools.doctor.checks import quick
from ds_gpt2.tools.doctor.finding import Finding, in_one_line
from ds_gpt2.tools.doctor.nodes import node_findings
from ds_gpt2.training import fork
from ds_gpt2.training.fork import Parent, PlannedFork
from ds_gpt2.training.preflight import check_initial_model, check_source, check_start
from ds_gpt2.training.resume_choice import CheckpointsGoneError, starts_new_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in ds_configs/")
    parser.add_argument("--auto", action="store_true", help="resume the run if it has checkpoints")
    add_fork_argument(parser)
    add_start_arguments(parser)
    add_hostfile_argument(parser)


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory (default: the newest run)")
    parser.add_argument(
        "--from",
        dest="source",
        default="latest",
        metavar="latest|backup|best|epoch_00003|STEP|before:STEP|TAG|PATH",
        help="which checkpoint (default: the newest good checkpoint); backup: the checkpoint before the newest, not one"
        " from checkpoint.backup.to; before:STEP: the newest good one before a step",
    )
    parser.add_argument(
        "--leave_out", metavar="BATCHES", help="exclude these batches of the data from training, such as 1200-1210,1250"
    )
    add_start_arguments(parser)
    add_hostfile_argument(parser)


def run(options: argparse.Namespace) -> int:
    config = find_config(options.config)
    overrides = with_hostfile(parse_overrides(options.settings), options.hostfile)
    resume = "auto" if options.auto else None
    settings = run_location.load(config, overrides)
    hosts = hosts_of(settings, options.num_gpus)
    ranks = None if hosts else options.num_gpus  # of a Slurm job, --num_gpus is the number on each node
    if options.fork is None or (options.auto and fork.is_begun(settings, options.fork)):
        return start(config, overrides, settings, hosts, ranks, resume)
    check_unsupervised(settings)
    parent = fork.find_parent(options.fork, settings)
    if fork.is_complete(settings, parent):
        print(f"run {settings.run.name} was forked by an earlier command: starting it")
        return start(config, overrides, settings, hosts, ranks, "latest")
    return start(config, overrides, settings, hosts, ranks, "latest", parent=parent)


def resume(options: argparse.Namespace) -> int:
    words = ([options.run] if options.run else []) + options.settings
    if words and "=" in words[0]:  # RUN is omitted: the first word is a setting
        options.run, options.settings = None, words
    run_dir = find_run(options.run)
    overrides = with_hostfile(parse_overrides(options.settings), options.hostfile)
    settings = load_run_settings(run_dir, overrides)
    if settings.run_dir != run_dir:
        named = "run.name" if "run.name" in overrides else "run.dir"
        raise UserError(
            f"{named} of an existing run is determined by its location: move {run_dir}, or start another run with"
            " `train`"
        )
    check_unsupervised(settings)
    ranks = options.num_gpus
    leave_out = parse_batches(options.leave_out)
    check_source(settings, options.source, leave_out)
    hosts = hosts_of(settings, ranks)
    if hosts or ranks is None:
        ranks, overrides = _fit_ranks(settings, overrides, hosts)
    settings = load_run_settings(run_dir, overrides)
    return start(run_dir / CONFIG, overrides, settings, hosts, ranks, options.source, leave_out)


def _fit_ranks(settings: Settings, overrides: dict[str, str], hosts: Sequence[Host]) -> tuple[int, dict[str, str]]:
    """Return how many of the devices can divide the run's token budget, and overrides that fit them."""
    batch = settings.batch
    available = sum(host.slots for host in hosts) if hosts else choose_ranks(settings, None).ranks
    ranks, micro_batch = fit_ranks(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, available)
    if ranks < available:
        print(f"{available} ranks cannot divide {batch.tokens_per_step} tokens per step equally: resuming with {ranks}")
    if micro_batch != batch.micro_batch:
        print(
            f"batch.micro_batch {batch.micro_batch} does not fit {counted(ranks, 'rank')}: resuming with {micro_batch}"
        )
        overrides = {**overrides, "batch.micro_batch": str(micro_batch)}
    return ranks, overrides


def start(
    config: Path,
    overrides: dict[str, str],
    settings: Settings,
    hosts: Sequence[Host],
    ranks: int | None,
    resume: str | None = None,
    leave_out: tuple[int, ...] = (),
    parent: Parent | None = None,
) -> int:
    """Check the settings without starting ranks, then supervise the run to its end; return the exit code.

    Args:
        hosts: of the ranks; none for this machine.
        ranks: their number; None for all devices.
        resume: what to resume from, see ``catalog.candidates``; None for a new run.
        leave_out: batches of the data to exclude from training.
        parent: a run to fork first; ``resume`` is then ``latest``.

    Raises:
        UserError: the settings or the machine do not allow the run, or it has a supervisor already.
    """
    check_unsupervised(settings)
    deepspeed_settings = load_deepspeed_file(settings.deepspeed)
    csv_monitor.check(deepspeed_settings)
    tracker_checks.check(deepspeed_settings)
    slots = sum(host.slots for host in hosts)
    layout = RankLayout(settings.run.device, ranks or slots) if hosts else choose_ranks(settings, ranks)
    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, layout.ranks)
    planned = None if parent is None else fork.plan_fork(settings, plan, parent)
    handled_later = (CheckpointsGoneError,) if resume == "auto" else ()  # the supervisor waits for the checkpoints
    with contextlib.suppress(*handled_later):
        if planned is None:
            check_start(settings, plan, resume)
    channels.check(settings.alerts)
    with contextlib.suppress(*handled_later):
        if starts_new_run(settings, resume):
            check_initial_model(settings)
    words = [str(config.absolute()), *(f"{key}={value}" for key, value in overrides.items())]
    run = SupervisedRun(("--config", *words), layout, resume, leave_out)
    if hosts:
        return _start_on_hosts(run, settings, hosts, words, planned)
    if not _is_ready(quick(settings, layout.accelerator, layout.ranks)):
        return exit_codes.MISTAKE
    if planned is not None:
        fork.create(planned)
    where = "GPUs" if layout.accelerator == "cuda" else "the CPU"
    print(f"starting {counted(layout.ranks, 'rank')} on {where} (Ctrl+C saves and stops) ...", flush=True)
    return supervise(run, settings)


def _start_on_hosts(
    run: SupervisedRun,
    settings: Settings,
    hosts: Sequence[Host],
    words: Sequence[str],
    planned: PlannedFork | None = None,
) -> int:
    """Connect to the hosts, check them, and supervise the run there; return the exit code.

    Args:
        words: the settings file and the overrides.
        planned: the fork to create before the start, if any.

    Raises:
        UserError: a host does not answer or does not fit the others.
    """
    print(f"connecting to {counted(len(hosts), 'host')} ...", flush=True)
    with cluster_of(settings, hosts, run.arguments) as cluster:
        cluster.start()
        if not _is_ready(node_findings(cluster, words)):
            return exit_codes.MISTAKE
        if planned is not None:
            fork.create(planned)
        where = cluster.describe(run.layout.ranks)
        print(f"starting {counted(run.layout.ranks, 'rank')} on {where} (Ctrl+C saves and stops) ...", flush=True)
        layout = replace(run.layout, accelerator=cluster.accelerator)
        return supervise(replace(run, layout=layout), settings, cluster)


def _is_ready(rows: Sequence[Finding]) -> bool:
    """Print the findings of the fast checks of ``doctor``; return False if the run would fail."""
    failed = [row for row in rows if row.status == "fail"]
    for row in failed or (row for row in rows if row.status == "warn"):
        print(f"{'error' if failed else 'warning'}: {in_one_line(row)}", file=sys.stderr)
    return not failed
