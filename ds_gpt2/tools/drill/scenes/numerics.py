"""Scenes with losses that are not finite or that diverge. They change the result of the run."""

from __future__ import annotations

import math

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.batch_plan import format_batches, plan_batch
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.drill.compare import loss_by_step, update_differences
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess
from ds_gpt2.tools.drill.scenes.scene import (
    Recovery,
    SceneContext,
    random_rank,
    stop_and_open_newest,
    train_state,
    verify_ledger,
)
from ds_gpt2.tools.drill.shrink import EVERY

_SPIKES = 4  # consecutive spikes of the loss that count as a divergence
_LONG_SPIKES, _LONG_EVERY = 12, 2  # a divergence over several saves, and the steps between two of them


def nan(context: SceneContext) -> Recovery:
    """Put a NaN into one micro-batch of one rank: all ranks must skip that update and change nothing."""
    run, rank = context.run, random_rank(context)
    before = stop_and_open_newest(run)
    step, state = before.step + 1, train_state(before.path)
    since = run.journal_position()
    micro_batch = context.generator.randrange(_accumulation(run))
    run.start(f"schedule.steps={step}", faults=[Fault("nan", step=step, rank=rank, micro_batch=micro_batch)])
    run.wait_done()
    after = train_state(run.checkpoint_dir / rolling_tag(step))
    if not any(event.step == step for event in run.events(since, "not_finite")):
        raise FailedError("the journal does not report the NaN")
    if after.skipped_steps != state.skipped_steps + 1 or after.batch != state.batch + 1:
        raise FailedError(f"{after.skipped_steps - state.skipped_steps} updates are counted as skipped, not 1")
    if found := update_differences(before.path, run.checkpoint_dir / rolling_tag(step)):
        raise FailedError(f"the skipped update has changed the state: {'; '.join(found[:3])}")
    text = f"NaN in micro-batch {micro_batch} of rank {rank} at step {step}: update skipped and counted"
    return Recovery(f"{text}, weights, masters and moments as before, bit for bit", 1, 0.0)


def divergence(context: SceneContext) -> Recovery:
    """Make the loss jump for several batches: the run must roll back and skip exactly these batches."""
    return _diverge(context, _SPIKES, EVERY)


def long_divergence(context: SceneContext) -> Recovery:
    """Do the same over several saves, with ``keep_last=1`` and a crash: a checkpoint from before must be retained."""
    return _diverge(context, _LONG_SPIKES, _LONG_EVERY, _LONG_SPIKES // 2)


def _diverge(context: SceneContext, spikes: int, every: int, crash_at: int | None = None) -> Recovery:
    """Inject a divergence and verify the rollback.

    Args:
        spikes: number of batches with a high loss.
        every: steps between two saves.
        crash_at: index of the spike at which a rank crashes as well; None: no crash.
    """
    run = context.run
    newest = stop_and_open_newest(run)
    state = train_state(newest.path)
    batches = list(range(state.next_batch + 2, state.next_batch + 2 + spikes))
    steps, since = newest.step + 2 + spikes + EVERY, run.journal_position()
    _train_with_spikes(context, steps, batches, every, crash_at)
    event = _divergence_event(run, since, batches)
    healthy = max(newest.step, (newest.step + 2) // every * every)  # the last save before the spikes
    origin = run.events(since, "start")[-1]
    if origin.step != healthy:
        raise FailedError(f"rolled back to step {origin.step}, not to {healthy}, the last save before the loss jumped")
    _verify_skipped(context, state, batches, steps)
    _verify_losses(run, newest)
    again = next(record["time"] for record in read_metrics(run.run_dir / METRICS) if record["step"] == event.step)
    crash = "" if crash_at is None else f", over {spikes // every} saves with keep_last=1 and a crash"
    text = f"the loss jumped at batches {format_batches(batches)}{crash}: rolled back to step {healthy}"
    lost_steps = (event.step or 0) - healthy
    return Recovery(f"{text}, skipped those batches, losses as before", lost_steps, again - event.time)


def _train_with_spikes(context: SceneContext, steps: int, batches: list[int], every: int, crash_at: int | None) -> None:
    """Train to ``steps`` with a high loss at ``batches``; arguments as for ``_diverge``."""
    run, rank = context.run, random_rank(context)
    overrides = [f"schedule.steps={steps}"]
    faults = [Fault("spike", batch=batch, rank=rank) for batch in batches]
    if crash_at is not None:
        overrides += [f"checkpoint.every={every}", "checkpoint.keep_last=1"]
        once = context.folder / "crash_in_divergence"
        faults.append(Fault("crash", batch=batches[crash_at], rank=rank, once=str(once)))
    guards = ["guards.spike=alert", "guards.divergence=rollback", f"guards.divergence_steps={len(batches)}"]
    run.start(*overrides, *guards, faults=faults)
    run.wait_done()


def _divergence_event(run: RunProcess, since: int, batches: list[int]) -> Event:
    """Return the only divergence in the journal; verify that it names exactly ``batches``."""
    events = run.events(since, "divergence")
    if [event.facts["batches"] for event in events] != [batches]:
        raise FailedError(f"the journal has {[event.text for event in events]}, not one divergence in {batches}")
    return events[0]


def _verify_skipped(context: SceneContext, before: TrainState, batches: list[int], steps: int) -> None:
    """Verify that the final state and ledger leave out exactly ``batches`` and those that were left out before."""
    left_out = [*before.left_out, *batches]
    final = train_state(context.run.checkpoint_dir / rolling_tag(steps))
    if final.left_out != left_out:
        raise FailedError(f"the skipped batches are {final.left_out}, not {left_out}")
    last = steps + len(left_out)
    verify_ledger(context, steps, [batch for batch in range(1, last + 1) if batch not in left_out])


def _verify_losses(run: RunProcess, before: Generation) -> None:
    """Verify that the losses after the rollback are not higher than before the divergence."""
    losses = loss_by_step(run.run_dir)
    highest = max(loss for step, loss in losses.items() if step <= before.step and math.isfinite(loss))
    if not all(loss <= highest + 1 for step, loss in losses.items() if step > before.step):
        raise FailedError("the losses are still high after the rollback")


def _accumulation(run: RunProcess) -> int:
    batch = run.settings.batch
    return plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, run.layout.ranks).accumulation
