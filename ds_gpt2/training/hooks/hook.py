"""The interface of a hook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from ds_gpt2.config.interval import Every
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818  # a request, not an error
    """A stop is requested; the hook has ended early."""


class Hook(ABC):
    """Measures something at the steps at which it is due, on every rank.

    A hook returns what it measured and changes nothing: no weight, no random state, not ``TrainState``. It logs its own
    failures in one line; they do not end the run.
    """

    every: Every
    can_be_repeated = True  # after a resume; False if it needs gradients or other state that is not saved
    progress: Callable[[], None] = staticmethod(lambda: None)  # to be called often; may raise Interrupted

    def before_update(self, engine: Engine) -> None:  # noqa: B027  # most hooks do not need gradients
        """Read the gradients after the step's last backward pass: under ZeRO-2 they exist only then."""

    @abstractmethod
    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        """Return the metrics of this step, measured after the update; the values of rank 0 are recorded.

        A ``val/loss`` among them becomes the run's validation loss.

        Raises:
            Interrupted: on every rank: a stop is requested.
            UserError: on every rank: data cannot be read.
        """


def on_all_ranks(part: Callable[[], T]) -> T:
    """Call ``part``, this rank's share of the work, and return its result. Every rank calls this.

    Raises:
        Interrupted: on every rank, if ``part`` raised it on any.
        UserError: on every rank, if ``part`` raised it on any.
    """

    def result_unless_interrupted() -> tuple[T] | None:
        try:
            return (part(),)
        except Interrupted:
            return None

    result = collectives.call_on_all_ranks(result_unless_interrupted)
    if collectives.any_rank_on_cpu(result is None) or result is None:
        raise Interrupted
    return result[0]
