"""Scenes in which the training data cannot be read."""

from __future__ import annotations

import time

from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.drill.run_process import FailedError
from ds_gpt2.tools.drill.scenes.scene import (
    Recovery,
    SceneContext,
    plan_fault,
    recovery,
    verify_not_restarted,
    verify_stopped,
)

_STOP_SECONDS = 30.0  # within which a stop must interrupt the retries of a read


def read_error(context: SceneContext) -> Recovery:
    """Make the first read of a shard fail: the error must be reported, the read retried, and nothing else changed."""
    run, planned = context.run, plan_fault(context, "read_error")
    batch, rank, since = planned.batch, planned.rank, planned.since
    run.start(faults=[Fault("read_error", batch=batch, rank=rank, once=str(planned.file))])
    run.wait_for("the step with the read error", lambda: run.done_steps() >= batch)
    errors = run.events(since, "data_error")
    if not errors or f"rank {rank}" not in errors[0].text:
        raise FailedError("the journal does not report the read error with its rank")
    verify_not_restarted(run, since, "the run did not continue without a restart")
    text = f"rank {rank} could not read a shard for step {batch}; reported, read at the next attempt"
    return Recovery(text, 0, 0.0)


def unreadable_data(context: SceneContext) -> Recovery:
    """Make a shard unreadable and stop the run: it must save the completed steps and exit within seconds."""
    run, planned = context.run, plan_fault(context, "unreadable_data")
    batch, rank, since = planned.batch, planned.rank, planned.since
    planned.file.touch()
    try:
        run.start(faults=[Fault("read_error", batch=batch, rank=rank, during=str(planned.file))])
        run.wait_for("a second failed read", lambda: len(run.events(since, "data_error")) > 1)
        run.wait_for("the step before it", lambda: run.done_steps() >= batch - 1)
        fault_time = time.time()
        run.interrupt()
        final_phases = ("saving", "finishing")
        run.wait_for(
            "the end of the reading",
            lambda: not run.alive or all(beat.phase in final_phases for beat in run.beats()),
            _STOP_SECONDS,
        )
        verify_stopped(run)
        seconds = time.time() - fault_time
    finally:
        planned.file.unlink()
    verify_not_restarted(run, since, "the run did not just stop")
    if (saved := run.saved_step()) != batch - 1:
        raise FailedError(f"step {batch - 1} was done, but the newest checkpoint is of step {saved}")
    resumed = run.journal_position()
    run.start()
    text = f"rank {rank} could not read a shard for step {batch}; Ctrl+C: exit code 3 after {seconds:.0f} s with"
    return recovery(context, resumed, fault_time, saved, f"{text} step {saved} saved; resumed")
