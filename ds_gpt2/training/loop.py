"""Training as a person would tell it."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ds_gpt2.checkpoint.manager import Checkpoints
from ds_gpt2.checkpoint.naming import BEST_TAG, epoch_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import duration
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine, Update
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation.loss import perplexity
from ds_gpt2.monitoring.console import StepLines
from ds_gpt2.monitoring.monitor import Monitor, StepMetrics, from_plain, to_plain
from ds_gpt2.monitoring.step_timer import Meter
from ds_gpt2.run_dir.heartbeat import Heartbeat
from ds_gpt2.run_dir.stop_request import StopRequest
from ds_gpt2.training.guards import Guard
from ds_gpt2.training.hooks import Hook, Interrupted
from ds_gpt2.training.lr_schedule import Every

_LAST_SAVE_SECONDS = 1800.0  # a disk may be made room on

log = logging.getLogger(__name__)


class Ending(enum.Enum):
    """How a run came to its end."""

    DONE = "done"
    STOPPED = "stopped on request"
    ROLLBACK = "not to be trusted any more: to go back"
    NOT_FINITE = "every step is made, but the training is broken"
    UNSAVED = "ended, but its last state could not be saved"


@dataclass(frozen=True)
class Course:
    """How far to go, how fast to learn, when to save."""

    steps: int
    learning_rate: Callable[[int], float]  # of a step, 1-based
    save: Every
    stop_seconds: float = 0.0  # after a request to stop, to get the last state saved


def train(
    course: Course,
    state: TrainState,
    engine: Engine,
    data: TrainingData,
    hooks: Sequence[Hook],
    monitor: Monitor,
    checkpoints: Checkpoints,
    meter: Meter,
    lines: StepLines,
    stop: StopRequest,
    guard: Guard,
    heartbeat: Heartbeat,
) -> Ending:
    """Train from ``state`` to the last step, or to where a stop is asked for; then all is saved.

    An evaluation that a stop or unreadable data interrupts is repeated after the resume, so that records, curves and
    the best checkpoint do not depend on it. Where the guard finds that the run has to go back, nothing of what it
    cannot trust is saved.

    Raises:
        UserError: on every rank, after all is saved: data cannot be read.
    """

    def save(roles: Sequence[str] = ()) -> None:
        heartbeat.enter("saving")
        if not guard.rollback:
            guard.judge_weights(state, collectives.gather_objects(engine.fingerprint()))
        if not guard.rollback:
            monitor.flush(durable=True)
            checkpoints.save(state, data.epoch(state.batch), roles)

    def finish_step(due: Sequence[Hook], seen: StepMetrics, repeated: bool = False) -> str | None:
        """Evaluate and record this step, and save it if due. Returns why the evaluation failed, the same on all ranks;
        None if it is complete or a stop has interrupted it."""
        heartbeat.enter("evaluating")
        problem = _observe(due, engine, state, seen)
        meter.mark("eval")
        if state.is_evaluated:
            monitor.write(state.step, seen)
            roles = _roles(state, data)
            if roles or repeated or course.save.due(state.step, course.steps):
                save(roles)
                meter.mark("save")
        return problem

    stopping, problem = False, None
    if state.unevaluated is not None:
        meter.begin()
        due = [hook for hook in _due(hooks, state.step, course) if hook.can_be_repeated]
        problem = finish_step(due, from_plain(state.unevaluated), repeated=True)
    while state.step < course.steps and state.is_evaluated and not (stopping or guard.rollback):
        meter.begin()
        step, batch = state.step + 1, state.next_batch
        heartbeat.begin_step(step, batch)
        due = _due(hooks, step, course)
        lr = course.learning_rate(step)
        batches = meter.waiting_for(data.micro_batches(batch))
        loss = engine.accumulate(batches, lambda: collectives.any_rank_on_cpu(stop.requested))
        if loss is None:  # asked to stop within a step, none of which has reached the weights
            stopping = True
            break
        meter.mark("forward_backward")
        for hook in due:
            hook.before_update(engine)
        meter.mark("eval")
        mean_loss, stopping, is_read = _agree(loss, stop, data)
        if not is_read:
            engine.drop()
            break
        update = engine.apply(lr, skip=not guard.judge_loss(state, mean_loss))
        meter.mark("update")
        windows = data.windows_of(batch).tobytes()
        state.advance(data.plan.tokens_per_step, update.applied, windows, update.clipped)
        guard.judge_update(state, mean_loss, update.applied, windows)
        seen: StepMetrics = {**_scalars(mean_loss, lr, update, state, data), **meter.end(step)}
        lines.show(step, seen, meter.eta(step, course.steps))
        problem = finish_step(due, seen)
    save()
    _insist(save, checkpoints, state, stop, guard, heartbeat, course.stop_seconds)
    heartbeat.enter("finishing")
    done = state.step >= course.steps and state.is_evaluated and not guard.rollback
    saved = checkpoints.finish(state, for_good=done)
    if not stopping:
        collectives.raise_on_all_ranks(data.problem or problem)
    if guard.rollback:
        return Ending.ROLLBACK
    if not saved:
        return Ending.UNSAVED
    if done and not (
        guard.is_sound(state) and not collectives.any_rank(not engine.has_finite_weights(), engine.device)
    ):
        return Ending.NOT_FINITE
    return Ending.DONE if done else Ending.STOPPED


def _insist(
    save: Callable[[], None],
    checkpoints: Checkpoints,
    state: TrainState,
    stop: StopRequest,
    guard: Guard,
    heartbeat: Heartbeat,
    stop_seconds: float,
) -> None:
    """Try again to save the last state: otherwise steps are lost. After a request to stop, ``stop_seconds`` at most."""
    begun, limit, pause = time.monotonic(), _LAST_SAVE_SECONDS, 1.0
    while not (checkpoints.has_saved(state) or guard.rollback):
        if collectives.any_rank_on_cpu(stop.requested):
            limit = min(limit, stop_seconds)
        left = collectives.gather_objects(begun + limit - time.monotonic())[0]  # by one clock: all ranks decide alike
        if left < pause:
            return
        if collectives.is_main():
            log.error(f"step {state.step} is not saved: trying again in {pause:g} s, for {duration(left)}")
        time.sleep(pause)
        pause = min(2 * pause, 30.0)
        heartbeat.beat()
        save()


def _agree(loss: torch.Tensor, stop: StopRequest, data: TrainingData) -> tuple[float, bool, bool]:
    """One small all-reduce for the mean loss of all ranks, whether any was asked to stop, and whether all have read."""
    flags = loss.new_tensor([float(stop.requested), float(data.problem is not None)])
    total_loss, requests, unread = collectives.sum_over_ranks(torch.cat([loss.reshape(1), flags])).tolist()
    return total_loss / collectives.world_size(), requests > 0, unread == 0


def _due(hooks: Sequence[Hook], step: int, course: Course) -> list[Hook]:
    return [hook for hook in hooks if hook.every.due(step, course.steps)]


def _observe(due: Sequence[Hook], engine: Engine, state: TrainState, seen: StepMetrics) -> str | None:
    """Add what the hooks see at this step to ``seen``. If they are interrupted, ``state`` keeps what is not repeated.

    Returns:
        Why they failed, the same on all ranks; None if they have not, or a stop is requested.
    """
    before, kept = replace(state), dict(seen)
    try:
        for hook in due:
            observed = hook.observe(engine, state)
            seen |= observed
            kept |= {} if hook.can_be_repeated else observed
        state.unevaluated = None
    except (Interrupted, UserError) as reason:
        state.forget_validation_since(before)
        state.unevaluated = to_plain(kept)
        if isinstance(reason, UserError):
            return str(reason)
        log.info(f"step {state.step}: a stop interrupts the evaluation; it is repeated when the run resumes")
    return None


def _roles(state: TrainState, data: TrainingData) -> list[str]:
    """What a checkpoint of this very step is worth keeping as."""
    epochs_done = int(data.epoch(state.batch))
    roles = [epoch_tag(epochs_done)] if epochs_done > int(data.epoch(state.previous_batch)) else []
    return [*roles, BEST_TAG] if state.best_step == state.step else roles


def _scalars(loss: float, lr: float, update: Update, state: TrainState, data: TrainingData) -> StepMetrics:
    return {
        "train/loss": loss,
        "train/perplexity": perplexity(loss),
        "train/lr": lr,
        "train/grad_norm": update.grad_norm,
        "train/clipped_share": state.clipped_share,
        "train/skipped_steps": state.skipped_steps,
        "train/tokens": state.tokens,
        "train/epoch": data.epoch(state.batch),
    }
