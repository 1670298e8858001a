"""Training as a person would tell it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_gpt2 import dist
from ds_gpt2.checkpoint.store import Checkpoints
from ds_gpt2.console import StepLines
from ds_gpt2.data.batches import TrainingData
from ds_gpt2.engine import Engine, Update
from ds_gpt2.hooks import Hook
from ds_gpt2.meter import Meter
from ds_gpt2.monitor import Monitor, Seen
from ds_gpt2.schedule import Every
from ds_gpt2.state import TrainState
from ds_gpt2.stop import StopRequest

log = logging.getLogger(__name__)


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
) -> bool:
    """Train from ``state`` to the last step; True if done, False if stopped on request. Either way all is saved."""
    stopping = False
    while state.step < course.steps and not stopping:
        meter.begin()
        lr = course.learning_rate(state.step + 1)
        loss = engine.accumulate(data.micro_batches(state.step + 1))
        update = engine.apply(lr)
        state.advance(data.plan.tokens_per_step, update.applied)
        mean_loss, stopping = _agree(loss, stop)
        seen = _scalars(mean_loss, lr, update, state, data) | meter.end()
        lines.show(state.step, seen, meter.eta(course.steps - state.step))
        for hook in hooks:
            if hook.every.due(state.step, course.steps):
                seen |= hook.observe(engine, state)
        monitor.write(state.step, seen)
        if stopping or course.save.due(state.step, course.steps):
            tag = checkpoints.save(state)
            monitor.flush()
            log.info(f"step {state.step}: saved {checkpoints.directory / tag}")
    return state.step >= course.steps


def _agree(loss: torch.Tensor, stop: StopRequest) -> tuple[float, bool]:
    """The mean loss over all ranks, and whether any of them was asked to stop: one small all-reduce for both."""
    totals = torch.stack([loss, loss.new_tensor(float(stop.requested))])
    total_loss, requests = dist.sum_over_ranks(totals).tolist()
    return total_loss / dist.world_size(), requests > 0


def _scalars(loss: float, lr: float, update: Update, state: TrainState, data: TrainingData) -> Seen:
    return {
        "train/loss": loss,
        "train/lr": lr,
        "train/grad_norm": update.grad_norm,
        "train/skipped_steps": state.skipped_steps,
        "train/tokens": state.tokens,
        "train/epoch": data.epoch(state.step),
    }
