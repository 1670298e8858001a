"""Training as a person would tell it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_gpt2 import dist
from ds_gpt2.checkpoint.layout import BEST_TAG, epoch_tag
from ds_gpt2.checkpoint.store import Checkpoints
from ds_gpt2.console import StepLines
from ds_gpt2.data.batches import TrainingData
from ds_gpt2.engine import Engine, Update
from ds_gpt2.hooks import Hook, perplexity
from ds_gpt2.meter import Meter
from ds_gpt2.monitor import Monitor, Seen
from ds_gpt2.schedule import Every
from ds_gpt2.state import TrainState
from ds_gpt2.stop import StopRequest


class Ending(enum.Enum):
    """How a run came to its end."""

    DONE = "done"
    STOPPED = "stopped on request"
    UNSAVED = "ended, but its last state could not be saved"


@dataclass(frozen=True)
class Course:
    """How far to go, how fast to learn, when to save."""

    steps: int
    learning_rate: Callable[[int], float]  # of a step, 1-based
    save: Every


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
) -> Ending:
    """Train from ``state`` to the last step, or to where a stop is asked for; then all is saved."""
    stopping = False
    while state.step < course.steps and not stopping:
        meter.begin()
        step = state.step + 1
        due = [hook for hook in hooks if hook.every.due(step, course.steps)]
        lr = course.learning_rate(step)
        batches = meter.waiting_for(data.micro_batches(step))
        loss = engine.accumulate(batches, lambda: dist.any_rank_on_cpu(stop.requested))
        if loss is None:  # asked to stop within a step, none of which has reached the weights
            break
        meter.mark("forward_backward")
        for hook in due:
            hook.before_update(engine)
        meter.mark("eval")
        update = engine.apply(lr)
        meter.mark("update")
        state.advance(data.plan.tokens_per_step, update.applied, data.step_windows(step).tobytes(), update.clipped)
        mean_loss, stopping = _agree(loss, stop)
        seen: Seen = {**_scalars(mean_loss, lr, update, state, data), **meter.end()}
        lines.show(step, seen, meter.eta(course.steps - step))
        for hook in due:
            seen |= hook.observe(engine, state)
        meter.mark("eval")
        monitor.write(step, seen)
        roles = _roles(state, data)
        if roles or course.save.due(step, course.steps):
            monitor.flush(durable=True)
            checkpoints.save(state, data.epoch(step), roles)
            meter.mark("save")
    checkpoints.save(state, data.epoch(state.step))
    done = state.step >= course.steps
    if not checkpoints.finish(state, for_good=done):
        return Ending.UNSAVED
    return Ending.DONE if done else Ending.STOPPED


def _agree(loss: torch.Tensor, stop: StopRequest) -> tuple[float, bool]:
    """The mean loss over all ranks, and whether any of them was asked to stop: one small all-reduce for both."""
    totals = torch.stack([loss, loss.new_tensor(float(stop.requested))])
    total_loss, requests = dist.sum_over_ranks(totals).tolist()
    return total_loss / dist.world_size(), requests > 0


def _roles(state: TrainState, data: TrainingData) -> list[str]:
    """What a checkpoint of this very step is worth keeping as."""
    epochs_done = int(data.epoch(state.step))
    roles = [epoch_tag(epochs_done)] if epochs_done > int(data.epoch(state.step - 1)) else []
    return [*roles, BEST_TAG] if state.best_step == state.step else roles


def _scalars(loss: float, lr: float, update: Update, state: TrainState, data: TrainingData) -> Seen:
    return {
        "train/loss": loss,
        "train/perplexity": perplexity(loss),
        "train/lr": lr,
        "train/grad_norm": update.grad_norm,
        "train/clipped_share": state.clipped_share,
        "train/skipped_steps": state.skipped_steps,
        "train/tokens": state.tokens,
        "train/epoch": data.epoch(state.step),
    }
