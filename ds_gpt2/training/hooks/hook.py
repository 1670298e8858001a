"""What the loop asks of an observer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.lr_schedule import Every

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818  # a request, not an error
    """A stop is requested, and an observation has ended early."""


class Hook(ABC):
    """Looks at training at the steps at which it is due, on every rank; it changes nothing, random state included.

    What it cannot do it says in one line; it never ends a run.
    """

    every: Every
    can_be_repeated = True  # after a resume; False if it needs what only the training process has
    progress: Callable[[], None] = staticmethod(lambda: None)  # called during long observations; may raise Interrupted

    def before_update(self, engine: Engine) -> None:  # noqa: B027  # most hooks have nothing to do here
        """After the step's last backward pass: under ZeRO-2 gradients exist only here."""

    @abstractmethod
    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        """What there is to see after the update; the values count on rank 0.

        Raises:
            Interrupted: on every rank, because a stop is requested.
            UserError: on every rank, because data cannot be read.
        """


def on_all_ranks(part: Callable[[], T]) -> T:
    """Call ``part``, this rank's share of an observation, and return what it returns. Every rank calls this.

    Raises:
        Interrupted: on every rank, if ``part`` raised it on any.
        UserError: on every rank, if ``part`` raised it on any.
    """

    def unless_interrupted() -> tuple[T] | None:
        try:
            return (part(),)
        except Interrupted:
            return None

    result = collectives.call_on_all_ranks(unless_interrupted)
    if collectives.any_rank_on_cpu(result is None) or result is None:
        raise Interrupted
    return result[0]
