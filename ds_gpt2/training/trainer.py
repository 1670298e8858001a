"""The training loop."""

from __future__ import annotations

import enum
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_gpt2.checkpoint.manager import Checkpoints
from ds_gpt2.checkpoint.naming import BEST_TAG, epoch_tag
from ds_gpt2.common.formatting import duration
from ds_gpt2.config.interval import Every
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine, Update
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation.loss import perplexity
from ds_gpt2.monitoring.monitor import StepMetrics, from_plain, to_plain
from ds_gpt2.monitoring.step_reporter import StepReporter
from ds_gpt2.run_dir.stop_request import StopRequest
from ds_gpt2.training.evaluator import Evaluator, repeatable
from ds_gpt2.training.guards import Guard
from ds_gpt2.training.hooks import Hook

_LAST_SAVE_SECONDS = 1800.0  # how long saving the last state is retried: a user may free disk space

log = logging.getLogger(__name__)


class Ending(enum.Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped on request"
    ROLLBACK = "stopped to roll back"
    NOT_FINITE = "all steps are done, but losses or weights are not finite"
    UNSAVED = "ended, but the last state could not be saved"


@dataclass(frozen=True)
class TrainingSchedule:
    """The length of a run, its learning rate, and when it saves."""

    steps: int
    learning_rate: Callable[[int], float]  # of a step, 1-based
    save_every: Every
    stop_seconds: float = 0.0  # after a stop request, the time for saving the last state


@dataclass
class Trainer:
    """The parts of one run on this rank, as ``setup.build_run`` connects them."""

    schedule: TrainingSchedule
    engine: Engine
    data: TrainingData
    guard: Guard
    evaluator: Evaluator
    checkpoints: Checkpoints
    reporter: StepReporter
    stop: StopRequest

    def train(self, state: TrainState) -> Ending:
        """Train from ``state`` to the last step, or until a stop is requested, and save the last state.

        An evaluation that a stop interrupts is repeated when the run resumes, so that records, curves and the best
        checkpoint do not depend on the interruption. If the guard requests a rollback, no untrusted state is saved.

        Raises:
            UserError: on every rank, after the state is saved: data cannot be read.
        """
        self._repeat_evaluation(state)
        stopping = False
        while self._has_steps_left(state) and not stopping:
            step, batch = state.step + 1, state.next_batch
            self.reporter.begin_step(step, batch)
            due, lr = self.evaluator.due(step, self.schedule.steps), self.schedule.learning_rate(step)
            micro_batches = self.reporter.timer.waiting_for(self.data.micro_batches(batch))
            loss = self.engine.accumulate(micro_batches, lambda: collectives.any_rank_on_cpu(self.stop.requested))
            if loss is None:  # a stop is requested, and the step is discarded
                stopping = True
                break
            self.reporter.end_phase("forward_backward")
            due = self.evaluator.before_update(due, self.engine, step)
            self.reporter.end_phase("eval")
            mean_loss, stopping, is_read = self._agree(loss)
            if not is_read:
                self.engine.discard_step()
                break
            update = self._update(state, mean_loss, lr)
            self.reporter.end_phase("update")
            metrics = _step_metrics(mean_loss, lr, update, state, self.data.epoch(state.batch))
            metrics |= self.data.source_metrics(state.batch)
            self.reporter.end_step(step, metrics)
            self.evaluator.measure_once(due, self.engine, state, metrics)
            self._finish_step(state, due, metrics)
        return self._end(state, stopping)

    def _has_steps_left(self, state: TrainState) -> bool:
        return state.step < self.schedule.steps and state.is_evaluated and not self.guard.rollback

    def _agree(self, loss: torch.Tensor) -> tuple[float, bool, bool]:
        """Return the mean loss of all ranks, whether a stop is requested, and whether all have read their data."""
        flags = loss.new_tensor([float(self.stop.requested), float(self.data.problem is not None)])
        total_loss, requests, unread = collectives.sum_over_ranks(torch.cat([loss.reshape(1), flags])).tolist()
        return total_loss / collectives.world_size(), requests > 0, unread == 0

    def _update(self, state: TrainState, loss: float, lr: float) -> Update:
        """Update the weights unless the guard objects to loss or gradient, and count the step in ``state``."""
        windows = self.data.windows_of(state.next_batch).tobytes()
        accepted = self.guard.check_loss(state, loss)
        accept_norm = functools.partial(self.guard.check_gradient, state)
        update = self.engine.apply(lr, accept_norm) if accepted else self.engine.skip_update(lr)
        state.advance(self.data.plan.tokens_per_step, update.applied, windows, update.clipped)
        self.guard.check_update(state, loss, update.grad_norm, update.applied, windows)
        return update

    def _repeat_evaluation(self, state: TrainState) -> None:
        """Repeat the evaluation that was interrupted before the resume, if any."""
        if state.unevaluated is None:
            return
        self.reporter.timer.begin()
        due = self.evaluator.due(state.step, self.schedule.steps)
        self._finish_step(state, due, from_plain(state.unevaluated), is_repeated=True)

    def _finish_step(
        self, state: TrainState, due: Sequence[Hook], metrics: StepMetrics, is_repeated: bool = False
    ) -> None:
        """Evaluate, record and save this step, as far as each is due.

        The save comes before the evaluation, which may end the process. The same checkpoint then receives the results.
        """
        roles = self._epochs(state)
        save_is_due = bool(roles) or is_repeated or self.schedule.save_every.due(state.step, self.schedule.steps)
        if repeatable(due):
            state.unevaluated = to_plain(metrics)
            if save_is_due:
                self._save(state)
                self.reporter.end_phase("save")
            self.reporter.enter("evaluating")
            self.evaluator.evaluate(due, self.engine, state, metrics, lambda: self._await_save(state))
            self.reporter.end_phase("eval")
        else:
            state.unevaluated = None
        if state.is_evaluated:
            self.reporter.record(state.step, metrics)
            if state.best_step == state.step:
                roles.append(BEST_TAG)
            if roles or save_is_due:
                self._save(state, roles)
                self.reporter.end_phase("save")

    def _epochs(self, state: TrainState) -> list[str]:
        """Return the tag of the epoch that ended with this step; none if no epoch ended."""
        epochs_done = int(self.data.epoch(state.batch))
        return [epoch_tag(epochs_done)] if epochs_done > int(self.data.epoch(state.previous_batch)) else []

    def _save(self, state: TrainState, roles: Sequence[str] = ()) -> None:
        """Save ``state`` unless the guard has requested a rollback, or requests one after checking the weights."""
        self.reporter.enter("saving")
        if not self.guard.rollback:
            self.guard.check_weights(state, collectives.gather_objects(self.engine.fingerprint()))
        if not self.guard.rollback:
            self.reporter.sync_records()
            if not self.checkpoints.add_evaluation(state, roles):
                self.checkpoints.save(state, self.data.epoch(state.batch), roles)

    def _await_save(self, state: TrainState) -> None:
        """Wait until the save of ``state`` is committed, if one is in progress."""
        self.reporter.enter("saving")
        self.checkpoints.has_saved(state)
        self.reporter.enter("evaluating")

    def _end(self, state: TrainState, stopping: bool) -> Ending:
        """Save the last state and wait until it is committed.

        Raises:
            UserError: on every rank: data could not be read, and no stop was requested.
        """
        self._save(state)
        self._retry_last_save(state)
        self.reporter.enter("finishing")
        done = state.step >= self.schedule.steps and state.is_evaluated and not self.guard.rollback
        saved = self.checkpoints.finish(state, complete=done)
        if not stopping:
            collectives.raise_on_all_ranks(self.data.problem)
        if self.guard.rollback:
            return Ending.ROLLBACK
        if not saved:
            return Ending.UNSAVED
        if done and not self._is_finite(state):
            return Ending.NOT_FINITE
        return Ending.DONE if done else Ending.STOPPED

    def _retry_last_save(self, state: TrainState) -> None:
        """Retry saving the last state until it succeeds; after a stop request, for ``stop_seconds`` at most."""
        start, limit, pause = time.monotonic(), _LAST_SAVE_SECONDS, 1.0
        while not (self.checkpoints.has_saved(state) or self.guard.rollback):
            if collectives.any_rank_on_cpu(self.stop.requested):
                limit = min(limit, self.schedule.stop_seconds)
            left = collectives.gather_objects(start + limit - time.monotonic())[0]  # rank 0 decides for all
            if left < pause:
                return
            if collectives.is_main():
                log.error(f"step {state.step:,} is not saved: retrying in {pause:g} s, for another {duration(left)}")
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
            self.reporter.heartbeat.beat()
            self._save(state)

    def _is_finite(self, state: TrainState) -> bool:
        """Return whether, on all ranks, updates were applied to the end and the weights are finite."""
        unhealthy = collectives.any_rank(not self.engine.has_finite_weights(), self.engine.device)
        return self.guard.is_healthy_end(state) and not unhealthy


def _step_metrics(loss: float, lr: float, update: Update, state: TrainState, epoch: float) -> StepMetrics:
    return {
        "train/loss": loss,
        "train/perplexity": perplexity(loss),
        "train/lr": lr,
        "train/grad_norm": update.grad_norm,
        "train/clipped_share": state.clipped_share,
        "train/skipped_steps": state.skipped_steps,
        "train/tokens": state.tokens,
        "train/epoch": epoch,
    }
