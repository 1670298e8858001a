"""One rank of a training run: ``deepspeed --num_gpus 4 ds_gpt2/train.py --config ds_configs/gpt2_124m.yaml``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started by the path of this file, as launchers do
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ds_gpt2.common.own_modules import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.common import terminal
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import parse_batches, plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.settings import Settings, dump_settings, parse_overrides
from ds_gpt2.distributed import collectives, device, launch_environment, torch_compile
from ds_gpt2.monitoring import csv_monitor, tracker_checks
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.stop_request import restore_default_handlers
from ds_gpt2.training import preflight

_PATIENCE_SECONDS = 20.0


def main(arguments: list[str] | None = None, prepare: Callable[[], None] = lambda: None) -> int:
    """Parse, check, train; returns the exit code.

    Args:
        prepare: called once DeepSpeed may be imported, before anything is built.
    """
    terminal.make_safe()
    terminal.ignore_write_errors()
    restore_default_handlers()
    try:
        launch_environment.adopt()
    except UserError as error:  # the rank is unknown
        print(f"error: {terminal.one_line(error)}", file=sys.stderr, flush=True)
        return exit_report.MISTAKE
    try:
        options, extra = parser().parse_known_args(arguments)
        if options.config is None:
            raise UserError("--config YAML is required, for example ds_configs/quickstart.yaml")
        settings = run_location.load(Path(options.config), _overrides(options, extra))
        if options.print_config:
            if collectives.is_main():
                print(dump_settings(settings), end="")
            return exit_report.DONE
        result = _run(settings, options, prepare)
    except UserError as error:
        if not collectives.is_main():
            _let_rank_0_report()
        print(f"error: {terminal.one_line(error)}", file=sys.stderr, flush=True)
        exit_report.report_failure(collectives.rank(), error)
        exit_report.report_outcome(Outcome(exit_report.MISTAKE))
        return exit_report.MISTAKE
    except UnicodeEncodeError as error:
        print(f"error: {terminal.encoding_error_message(error)}", file=sys.stderr, flush=True)
        exit_report.report_outcome(Outcome(exit_report.MISTAKE))
        return exit_report.MISTAKE
    except Exception as error:
        exit_report.report_failure(collectives.rank(), error)
        raise
    if collectives.is_main():
        exit_report.report_outcome(result)
    return exit_report.CRASHED if result.code == exit_report.ROLLBACK else result.code


def _let_rank_0_report() -> None:
    """Wait: every rank finds most mistakes, and the launcher ends the others once rank 0 has reported one.

    A rank that is still alive after a while is the only one that found the mistake, and reports it.
    """
    restore_default_handlers()
    time.sleep(_PATIENCE_SECONDS)


def parser() -> argparse.ArgumentParser:
    """The command line, with the flags that torchrun-style scripts have."""
    result = argparse.ArgumentParser(
        prog="ds_gpt2/train.py", description=__doc__, allow_abbrev=False, epilog="Any setting may follow as key=value."
    )
    result.add_argument("--config", metavar="YAML", help="the run's settings; required")
    result.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="WHERE",
        help="resume from latest, auto (latest, or a new run), backup (the previous one), best, step, tag or path",
    )
    result.add_argument(
        "--leave_out", metavar="BATCHES", help="batches of the data to exclude from training, such as 1200-1210,1250"
    )
    result.add_argument("--run_name", metavar="NAME", help="run.name")
    result.add_argument("--checkpoint_freq", metavar="STEPS", help="checkpoint.every")
    result.add_argument("--checkpoint_dir", metavar="DIR", help="checkpoint.dir")
    result.add_argument("--eval_freq", metavar="STEPS", help="validation.every")
    result.add_argument("--tensorboard_dir", metavar="DIR", help="monitor.dir")
    result.add_argument("--use_tensorboard", nargs="?", const="true", metavar="true|false", help="monitor.tensorboard")
    result.add_argument("--print-config", action="store_true", help="print the resulting settings and exit")
    result.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return result


_FLAGS = {
    "run_name": "run.name",
    "checkpoint_freq": "checkpoint.every",
    "checkpoint_dir": "checkpoint.dir",
    "eval_freq": "validation.every",
    "tensorboard_dir": "monitor.dir",
    "use_tensorboard": "monitor.tensorboard",
}


def _overrides(options: argparse.Namespace, extra: list[str]) -> dict[str, str]:
    for flag, default in (("resume", "latest"), ("use_tensorboard", "true")):
        value = getattr(options, flag)
        if value is not None and "=" in value:  # a setting that follows a flag without a value
            extra = [*extra, value]
            setattr(options, flag, default)
    flags = {key: value for flag, key in _FLAGS.items() if (value := getattr(options, flag)) is not None}
    return {**flags, **parse_overrides(extra)}


def _run(settings: Settings, options: argparse.Namespace, prepare: Callable[[], None]) -> Outcome:
    deepspeed_settings = load_deepspeed_file(settings.deepspeed)
    csv_monitor.check(deepspeed_settings)
    tracker_checks.check_packages(deepspeed_settings)
    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, collectives.world_size())
    preflight.check_start(settings, plan, options.resume)
    torch_device = device.choose(settings.run.device)
    is_compiled = torch_compile.decide(settings.run.compile, torch_device)
    torch_compile.set_up(is_compiled)
    if settings.run.deterministic:
        device.be_deterministic()
    from ds_gpt2.training.run import run  # only now: DeepSpeed picks its accelerator when it is imported
    from ds_gpt2.training.setup import RunSpec

    prepare()
    excluded = parse_batches(options.leave_out)
    return run(RunSpec(settings, deepspeed_settings, plan, torch_device, is_compiled, options.resume, excluded))


if __name__ == "__main__":
    exit_report.run_process(main)
