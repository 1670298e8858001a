"""Run the hooks that are due at a step, and record their results in the state and the step's metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_gpt2.common.errors import UserError
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics, to_plain
from ds_gpt2.training.hooks import Hook, Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """The hooks of a run, in the order in which they run. Every rank calls every method."""

    hooks: Sequence[Hook]

    def due(self, step: int, last_step: int) -> list[Hook]:
        """Return the hooks that are due at ``step``."""
        return [hook for hook in self.hooks if hook.every.due(step, last_step)]

    def due_again(self, step: int, last_step: int) -> list[Hook]:
        """Return the hooks due at ``step`` that can run again after a resume."""
        return [hook for hook in self.due(step, last_step) if hook.can_be_repeated]

    def before_update(self, due: Sequence[Hook], engine: Engine) -> None:
        """Let ``due`` read the gradients, which exist only between a step's last backward pass and its update."""
        for hook in due:
            hook.before_update(engine)

    def evaluate(self, due: Sequence[Hook], engine: Engine, state: TrainState, metrics: StepMetrics) -> str | None:
        """Run ``due``; add their metrics to ``metrics``, and a validation loss to ``state``.

        If a hook is interrupted, the metrics of hooks that cannot be repeated stay in ``state.unevaluated`` until the
        evaluation is repeated; nothing else of it is recorded.

        Returns:
            Why a hook failed, the same on all ranks; None if none failed or a stop interrupted it.
        """
        before, retained = replace(state), dict(metrics)
        try:
            for hook in due:
                measured = hook.observe(engine, state)
                metrics |= measured
                retained |= {} if hook.can_be_repeated else measured
                if isinstance(loss := measured.get("val/loss"), float):
                    state.record_validation(loss)
            state.unevaluated = None
        except (Interrupted, UserError) as reason:
            state.restore_validation(before)
            state.unevaluated = to_plain(retained)
            if isinstance(reason, UserError):
                return str(reason)
            log.info(f"step {state.step:,}: a stop interrupts the evaluation; it is repeated when the run resumes")
        return None
