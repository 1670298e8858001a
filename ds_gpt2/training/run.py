"""One rank's part of a run, from opening the process group to its outcome."""

from __future__ import annotations

import contextlib
import gc
import logging

from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import format_batches
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.process_group import close_process_group, open_process_group
from ds_gpt2.run_dir.exit_codes import CRASHED, DONE, ROLLBACK, STOPPED
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.training.machines import check_machines
from ds_gpt2.training.setup import BuiltRun, RunSpec, build_run
from ds_gpt2.training.trainer import Ending

log = logging.getLogger(__name__)

_NOT_FINITE_HINT = "resume from an earlier checkpoint with a lower schedule.max_lr"


def run(spec: RunSpec, problem: str | None = None) -> Outcome:
    """Train one rank's part of a run.

    Args:
        problem: see ``check_machines``.

    Raises:
        UserError: on every rank, for mistakes that the user can fix.
    """
    open_process_group(spec.device)
    with contextlib.ExitStack() as cleanup:
        try:
            check_machines(spec.settings, problem)
            built = build_run(spec, cleanup)
            outcome = _train(built)
        except UserError:
            close_process_group()
            raise
        close_process_group()
    return outcome


def _train(built: BuiltRun) -> Outcome:
    gc.collect()
    gc.freeze()  # a collection over the libraries' 400,000 objects takes 0.2 s, at a different time on each rank
    ending, stop = built.trainer.train(built.state), built.trainer.stop
    if ending is Ending.STOPPED:  # possibly because of a signal that only another rank has received
        stop.connection_lost = collectives.any_rank_on_cpu(stop.connection_lost)
    _close(built, ending)
    outcome = _outcome(built, ending)
    if built.lock is not None:
        _record_end(built, ending, outcome)
        built.lock.close()
    return outcome


def _close(built: BuiltRun, ending: Ending) -> None:
    """Close the parts of the run and log how it ended."""
    trainer, step = built.trainer, built.state.step
    trainer.reporter.lines.close()
    trainer.reporter.monitor.close()
    trainer.stop.clear()
    directory = trainer.checkpoints.directory
    newest = newest_tag(directory)
    saved = f"checkpoint {directory / newest}" if newest else "no checkpoint is saved"
    if ending is Ending.STOPPED and trainer.stop.reason is not None:
        log.warning(f"{trainer.stop.reason}: stopping")
    how = f"stopped {trainer.stop.cause}" if ending is Ending.STOPPED else ending.value
    log.info(f"{how} at step {step:,} of {trainer.schedule.steps:,}; {saved}")
    trainer.engine.close()


def _outcome(built: BuiltRun, ending: Ending) -> Outcome:
    rollback = built.trainer.guard.rollback
    if rollback is not None:
        batches = format_batches(rollback.batches)
        leave_out = f" --leave_out {batches}" if batches else ""
        log.info(
            f"to roll back: --resume before:{rollback.first_step}{leave_out} (the supervisor does it automatically)"
        )
        return Outcome(ROLLBACK, before=rollback.first_step, leave_out=rollback.batches)
    if ending is Ending.NOT_FINITE:
        log.error(f"losses or weights are not finite: {_NOT_FINITE_HINT}")
    code = {Ending.DONE: DONE, Ending.STOPPED: STOPPED}.get(ending, CRASHED)
    stop = built.trainer.stop
    return Outcome(code, supervisor_lost=stop.supervisor_lost or stop.connection_lost)


def _record_end(built: BuiltRun, ending: Ending, outcome: Outcome) -> None:
    """Write the end to the journal. The supervisor records crashes, and the rollbacks that it makes."""
    journal, step, steps = built.journal, built.state.step, built.trainer.schedule.steps
    if ending is Ending.UNSAVED:
        journal.write("save_failed", ending.value, step, ended=True)
    elif ending is Ending.NOT_FINITE:
        journal.write("not_finite", f"{ending.value}: {_NOT_FINITE_HINT}", step, ended=True)
    if outcome.code == DONE:
        journal.write("done", f"done, {steps:,} steps", step)
    elif outcome.code == STOPPED:
        journal.write("stop", f"stopped {built.trainer.stop.cause} at step {step:,} of {steps:,}, saved", step)
