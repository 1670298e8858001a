"""Run the hooks that are due at a step, and record their results in the state and the step's metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.evaluation_attempts import EvaluationAttempts
from ds_gpt2.training.hooks import Hook, HookFailedError, Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """The hooks of a run, in the order in which they run. Every rank calls every method.

    A hook that fails costs its metrics of this step only: the failure is reported, and training continues.
    """

    hooks: Sequence[Hook]
    attempts: EvaluationAttempts
    report: Callable[[int, str], None]  # called with the step and a text, on every rank

    def due(self, step: int, last_step: int) -> list[Hook]:
        """Return the hooks that are due at ``step``."""
        return [hook for hook in self.hooks if hook.every.due(step, last_step)]

    def before_update(self, due: Sequence[Hook], engine: Engine, step: int) -> list[Hook]:
        """Let ``due`` read the gradients, which exist only between a step's last backward pass and its update.

        Returns:
            The hooks that are still due: those that did not fail.
        """
        working = []
        for hook in due:
            try:
                hook.before_update(engine)
                working.append(hook)
            except HookFailedError as error:
                self._report_failure(hook, error, step, engine)
        return working

    def measure_once(self, due: Sequence[Hook], engine: Engine, state: TrainState, metrics: StepMetrics) -> None:
        """Run the hooks among ``due`` that cannot be repeated after a resume; add their metrics to ``metrics``."""
        for hook in due:
            if not hook.can_be_repeated:
                metrics |= self._observe(hook, engine, state)

    def evaluate(
        self,
        due: Sequence[Hook],
        engine: Engine,
        state: TrainState,
        metrics: StepMetrics,
        await_save: Callable[[], object] = lambda: None,
    ) -> None:
        """Run the other hooks among ``due``; add their metrics to ``metrics``, and a validation loss to ``state``.

        ``state.unevaluated`` becomes None. If a stop interrupts a hook, it stays, and nothing is recorded.

        Args:
            await_save: waits until the save in progress is committed; called before the first hook that may end the
                process.
        """
        before, step = replace(state), state.step
        is_safe = not self.attempts.begun(step)
        for hook in repeatable(due):
            if self.attempts.is_exhausted(step, hook.name):
                self.report(step, f"no {hook.name}: its last attempts ended the process")
                continue
            if not (is_safe and hook.is_bounded):
                await_save()
            self.attempts.begin(step, hook.name)
            try:
                measured = self._observe(hook, engine, state)
            except Interrupted:
                self.attempts.end(step, hook.name, succeeded=False)
                state.restore_validation(before)
                log.info(f"step {step:,}: a stop interrupts the evaluation; it is repeated when the run resumes")
                return
            self.attempts.end(step, hook.name, succeeded=bool(measured))
            metrics |= measured
            if isinstance(loss := measured.get("val/loss"), float):
                state.record_validation(loss)
        state.unevaluated = None

    def _observe(self, hook: Hook, engine: Engine, state: TrainState) -> StepMetrics:
        """Return the metrics of ``hook``; none, with a report, if it fails.

        Raises:
            Interrupted: on every rank: a stop is requested.
            Exception: of a collective, because another rank has ended: the run ends too.
        """
        try:
            return hook.observe(engine, state)
        except HookFailedError as error:
            self._report_failure(hook, error, state.step, engine)
            return {}

    def _report_failure(self, hook: Hook, error: HookFailedError, step: int, engine: Engine) -> None:
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()  # what was allocated before the memory ran out
        self.report(step, f"no {hook.name}: {error}")


def repeatable(hooks: Sequence[Hook]) -> list[Hook]:
    """Return the hooks that can run again after a resume."""
    return [hook for hook in hooks if hook.can_be_repeated]
