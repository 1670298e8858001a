"""Validation loss of the moving average of the weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.hooks.hook import Hook, HookFailedError, Interrupted
from ds_gpt2.training.hooks.validation import Validation

log = logging.getLogger(__name__)


class AveragedValidation(Hook):
    """Validation loss of the moving average of the weights, on the windows of ``Validation``, at the same steps.

    It is not part of ``Validation``, so that a failure here does not cost ``val/loss``.
    """

    name = "validation loss of the averaged weights"
    is_bounded = True

    def __init__(self, validation: Validation) -> None:
        self.every = validation.every
        self._validation = validation

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        with _averaged_weights(engine):
            loss = self._validation.loss(engine)
        log.info(f"step {state.step:,}: validation loss of the averaged weights {loss:.4f}")
        return {"val/loss_ema": loss}


@contextlib.contextmanager
def _averaged_weights(engine: Engine) -> Iterator[None]:
    """Evaluate with the moving average of the weights; afterwards the weights are those of the last update.

    Every rank enters and leaves together: setting weights is a collective operation. It allocates no tensor: weights
    are rounded and gathered in place, so it cannot run out of memory on one rank. Any other exception is that of a
    collective whose other ranks have ended, and ends the run: this rank must not wait for them here.
    """
    engine.use_averaged_weights()
    try:
        yield
    except (Interrupted, HookFailedError):  # every rank raises it, see ``on_all_ranks``
        engine.use_trained_weights()
        raise
    engine.use_trained_weights()
