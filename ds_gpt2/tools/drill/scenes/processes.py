"""Scenes that stop, kill or freeze processes of the run."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.watchdog import longest_silence
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess
from ds_gpt2.tools.drill.scenes.scene import (
    Recovery,
    SceneContext,
    plan_fault,
    random_local_rank,
    recovery,
    run_to_fault,
    run_to_random_point,
    stop,
)

_ORPHAN_SECONDS = 120.0  # within which ranks without a supervisor must exit


def exception(context: SceneContext) -> Recovery:
    """Raise an exception in one rank."""
    run, planned = context.run, plan_fault(context, "exception")
    step, rank = planned.batch, planned.rank
    run.start(faults=[Fault("crash", step=step, rank=rank, once=str(planned.file))])
    run.wait_for("detection of the crash", lambda: run.events(planned.since, "crash"))
    _verify_names_rank(run.events(planned.since, "crash")[0], rank)
    text = f"exception in rank {rank} at step {step}; named in the journal, restarted automatically"
    return recovery(context, run.journal_position(), planned.file.stat().st_mtime, step - 1, text)


def kill_rank(context: SceneContext) -> Recovery:
    """Send SIGKILL to one rank."""
    since, fault_time = run_to_fault(context)
    run, rank = context.run, random_local_rank(context)
    run.rank(rank).kill()
    run.wait_for("detection of the killed rank", lambda: run.events(since, "crash"))
    reached = run.done_steps()
    text = f"SIGKILL to rank {rank} after step {reached}; restarted automatically"
    return recovery(context, since, fault_time, reached, text)


def freeze_rank(context: SceneContext) -> Recovery:
    """Send SIGSTOP to one rank while it trains."""
    run_to_random_point(context)
    run, rank = context.run, random_local_rank(context)
    since, limit = run.journal_position(), _longest_hang(context)
    fault_time = _freeze_in_training(run, rank)
    reached = run.done_steps()
    run.wait_for("detection of the hang", lambda: run.events(since, "hang"), limit)
    hang = run.events(since, "hang")[0]
    _verify_names_rank(hang, rank)
    stacks = Path(hang.facts["stacks"])
    missing = [number for number in range(run.layout.ranks) if not _has_stacks(stacks / f"rank_{number:05d}.txt")]
    if missing:
        raise FailedError(f"no stacks of rank {', '.join(map(str, missing))} in {stacks}")
    text = f"SIGSTOP to rank {rank} after step {reached}; detected after {hang.time - fault_time:.0f} s"
    text += ", stacks of all ranks written, restarted automatically"
    return recovery(context, since, fault_time, reached, text)


def kill_launcher(context: SceneContext) -> Recovery:
    """Send SIGKILL to DeepSpeed's launcher."""
    since, fault_time = run_to_fault(context)
    run = context.run
    group = run.group
    for process in run.launchers():
        process.kill()
    reached = run.done_steps()
    run.wait_for("a new launch", lambda: run.events(since, "launch"))
    if left := rank_processes.members(group):
        raise FailedError(f"processes of the previous start still run: {[process.pid for process in left]}")
    text = f"SIGKILL to DeepSpeed's launcher after step {reached}; ranks ended, restarted automatically"
    return recovery(context, since, fault_time, reached, text)


def ctrl_c(context: SceneContext) -> Recovery:
    """Stop the run with Ctrl+C and resume it."""
    since, fault_time = run_to_fault(context)
    run = context.run
    reached = run.done_steps()
    stop(run)
    saved = _verify_saved(run, reached, "the newest checkpoint is of")
    run.start()
    text = f"Ctrl+C: exit code 3 with step {saved} saved; resumed"
    return recovery(context, since, fault_time, saved, text)


def kill_supervisor(context: SceneContext) -> Recovery:
    """Send SIGKILL to the supervisor; the ranks must save and exit."""
    since, fault_time = run_to_fault(context)
    run = context.run
    group, reached = run.group, run.done_steps()
    run.kill_supervisor()
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while rank_processes.members(group):
        if time.monotonic() > deadline:
            raise FailedError(f"the ranks still run {_ORPHAN_SECONDS:.0f} s after their supervisor was killed")
        time.sleep(0.1)
    saved = _verify_saved(run, reached, "the ranks without a supervisor saved")
    run.start()
    text = f"SIGKILL to the supervisor; the ranks saved step {saved} and exited; resumed"
    return recovery(context, since, fault_time, saved, text)


def kill_all(context: SceneContext) -> Recovery:
    """Send SIGKILL to every process of the run."""
    since, fault_time = run_to_fault(context)
    run = context.run
    run.kill_everything()
    reached = run.done_steps()
    run.start()
    text = f"SIGKILL to all processes simultaneously after step {reached}; resumed"
    return recovery(context, since, fault_time, reached, text)


def _verify_saved(run: RunProcess, reached: int, problem: str) -> int:
    """Return the step of the newest checkpoint; verify that it is not before ``reached``."""
    saved = run.saved_step()
    if saved < reached:
        raise FailedError(f"step {reached} was done, but {problem} step {saved}")
    return saved


def _verify_names_rank(event: Event, rank: int) -> None:
    if f"rank {rank}" not in event.text:
        raise FailedError(f"the journal does not name rank {rank}: {event.text}")


def _freeze_in_training(run: RunProcess, rank: int) -> float:
    """Stop a rank within a step, where the watchdog's limit is short; return the time in seconds since 1970."""
    process = run.rank(rank)
    while True:
        run.wait_for("a step", lambda: _is_training(run, rank))
        fault_time = time.time()
        process.suspend()
        time.sleep(0.1)
        if _is_training(run, rank):
            return fault_time
        process.resume()
        time.sleep(0.1)


def _is_training(run: RunProcess, rank: int) -> bool:
    return any(beat.phase == "training" for beat in run.beats() if beat.pid == run.rank(rank).pid)


def _longest_hang(context: SceneContext) -> float:
    """Return the seconds within which a hang must be detected."""
    settings = context.run.settings.supervisor
    records = read_metrics(context.run.run_dir / METRICS)
    step = statistics.median([record["perf/step_ms"] / 1000 for record in records if record.get("perf/step_ms")])
    return 1.5 * longest_silence(settings, True, step) + 10


def _has_stacks(file: Path) -> bool:
    return file.is_file() and "File " in file.read_text(encoding="utf-8", errors="replace")
