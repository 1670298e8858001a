"""The scene in which one of several hosts is lost."""

from __future__ import annotations

import time

from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation, problem_of
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.tools.drill.compare import loss_by_step
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.drill.run_process import FailedError
from ds_gpt2.tools.drill.scenes.equivalence import largest_loss_difference
from ds_gpt2.tools.drill.scenes.scene import (
    NotDoneError,
    Recovery,
    SceneContext,
    stop,
    verify_ledger,
    wait_for_checkpoint,
    wait_for_recovery,
)
from ds_gpt2.tools.drill.shrink import EVERY


def node(context: SceneContext) -> Recovery:
    """Kill all processes of a host, which then does not answer; the run must continue, and take the host back later.

    The run repeats its last steps from an older checkpoint, so that the losses can be compared. The host is taken back
    when a rank is killed near the end.
    """
    run, steps = context.run, context.steps
    if len(run.hosts.hosts) < 2 or not run.hosts.others:
        raise NotDoneError("needs a hostfile with another host besides this machine")
    chosen = context.generator.choice(run.hosts.others)
    host = chosen.name
    stop(run)
    older = _older_checkpoint(context)
    back = Fault("kill", step=steps - 2, once=str(context.folder / "host_back"))
    with run.hosts.connected([chosen]) as links:  # before the start: connecting takes as long as several steps
        run.start(f"schedule.steps={steps}", resume=older.tag, faults=[back])
        wait_for_checkpoint(run)
        since, reached, fault_time = run.journal_position(), run.done_steps(), time.time()
        with run.hosts.unreachable(chosen):
            if not run.hosts.kill_on(links[host], run.run_dir):
                raise FailedError(f"the run has no processes on {host}")
            origin, when = wait_for_recovery(run, since, reached)
    lost = run.events(since, "host_lost")
    if not lost or host not in lost[0].text:
        raise FailedError(f"the journal does not report the loss of {host}")
    if host in run.events(since, "launch")[0].text:
        raise FailedError(f"the run was restarted on {host}, which does not answer")
    run.wait_for(f"{host} to be taken back", lambda: run.events(since, "host_back"))
    without = max(loss_by_step(run.run_dir))  # the last step on fewer ranks; the next start may repeat those steps
    if without <= origin:
        raise FailedError(f"no step was trained without {host}")
    difference = largest_loss_difference(context, older.step, without)
    run.wait_done()
    _verify_end(context)
    difference = max(difference, largest_loss_difference(context, older.step, steps))
    text = f"all processes of {host} killed after step {reached}, and no answer: continued without it from step"
    text += f" {origin}, taken back at the next restart; the same windows, losses within {100 * difference:.2f}%"
    return Recovery(text, max(0, reached - origin), when - fault_time)


def _older_checkpoint(context: SceneContext) -> Generation:
    """Return the oldest intact checkpoint from which the run trains over at least two saves."""
    run, last = context.run, context.steps - 3 * EVERY
    found = [each for each in candidates(run.checkpoint_dir, f"before:{last + 1}") if problem_of(each) is None]
    if not found or found[0].step > last:
        raise FailedError(f"there is no checkpoint of step {last} or before to resume from")
    return found[0]


def _verify_end(context: SceneContext) -> None:
    """Verify that the last checkpoint is of all ranks, and of the same windows as that of the undisturbed run."""
    run, steps = context.run, context.steps
    manifest = open_generation(run.checkpoint_dir / rolling_tag(steps)).manifest
    if manifest is None or manifest.world_size != run.layout.ranks:
        raise FailedError(f"{rolling_tag(steps)} is not of all {run.layout.ranks} ranks")
    verify_ledger(context, steps, range(1, steps + 1))
