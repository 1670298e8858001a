"""One rank of a training run: ``deepspeed --num_gpus 4 ds_gpt2/train.py --config ds_configs/gpt2_124m.yaml``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started by the path of this file, as launchers do
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.common import terminal
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import train_arguments
from ds_gpt2.config.batch_plan import parse_batches, plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.settings import Settings, dump_settings
from ds_gpt2.config.train_arguments import TrainArguments
from ds_gpt2.distributed import collectives, device, launch_environment, torch_compile
from ds_gpt2.monitoring import csv_monitor, tracker_checks
from ds_gpt2.run_dir import exit_codes, exit_report, process_end
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.stop_request import restore_default_handlers
from ds_gpt2.training import machines, preflight

_PATIENCE_SECONDS = 20.0


def main(arguments: list[str] | None = None, prepare: Callable[[], None] = lambda: None) -> int:
    """Parse the command line, check the settings and train; return the exit code.

    Args:
        prepare: called once DeepSpeed may be imported, before anything is built.
    """
    terminal.make_safe()
    terminal.ignore_write_errors()
    restore_default_handlers()
    try:
        launch_environment.adopt()
    except UserError as error:  # the rank is unknown
        terminal.print_error(error)
        return exit_codes.MISTAKE
    try:
        command = train_arguments.parse(arguments)
        settings = command.settings()
        if command.print_config:
            if collectives.is_main():
                print(dump_settings(settings), end="")
            return exit_codes.DONE
        result = _run(settings, command, prepare)
    except UserError as error:
        if not collectives.is_main():
            _let_rank_0_report()
        terminal.print_error(error)
        exit_report.report_failure(collectives.rank(), error)
        exit_report.report_outcome(Outcome(exit_codes.MISTAKE))
        return exit_codes.MISTAKE
    except UnicodeEncodeError as error:
        terminal.print_error(terminal.encoding_error_message(error))
        exit_report.report_outcome(Outcome(exit_codes.MISTAKE))
        return exit_codes.MISTAKE
    except Exception as error:
        exit_report.report_failure(collectives.rank(), error)
        raise
    if collectives.is_main():
        exit_report.report_outcome(result)
    return exit_codes.CRASHED if result.code == exit_codes.ROLLBACK else result.code


def _let_rank_0_report() -> None:
    """Wait: every rank finds most mistakes, and the launcher ends the others once rank 0 has reported one.

    A rank that is still alive after a while is the only one that found the mistake, and reports it.
    """
    restore_default_handlers()
    time.sleep(_PATIENCE_SECONDS)


def _run(settings: Settings, command: TrainArguments, prepare: Callable[[], None]) -> Outcome:
    deepspeed_settings = load_deepspeed_file(settings.deepspeed)
    csv_monitor.check(deepspeed_settings)
    tracker_checks.check_packages(deepspeed_settings)
    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, collectives.world_size())
    problem = machines.problem_of(lambda: preflight.check_start(settings, plan, command.resume))
    torch_device = device.choose(settings.run.device)
    is_compiled = torch_compile.decide(settings.run.compile, torch_device)
    torch_compile.set_up(is_compiled)
    if settings.run.deterministic:
        device.be_deterministic()
    from ds_gpt2.training.run import run  # imported late: DeepSpeed selects its accelerator at import
    from ds_gpt2.training.setup import RunSpec

    prepare()
    excluded = parse_batches(command.excluded)
    spec = RunSpec(settings, deepspeed_settings, plan, torch_device, is_compiled, command.resume, excluded)
    return run(spec, problem)


if __name__ == "__main__":
    process_end.run_process(main)
