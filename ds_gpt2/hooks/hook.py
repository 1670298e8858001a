"""What the loop asks of an observer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ds_gpt2.engine import Engine
from ds_gpt2.monitor import Seen
from ds_gpt2.schedule import Every
from ds_gpt2.state import TrainState


class Hook(ABC):
    """Looks at training at the steps at which it is due, on every rank; it changes nothing, random state included.

    What it cannot do it says in one line; it never ends a run.
    """

    every: Every
    progress: Callable[[], None] = staticmethod(lambda: None)  # called now and then where observing takes long

    def before_update(self, engine: Engine) -> None:  # noqa: B027  # most hooks have nothing to do here
        """After the step's last backward pass: under ZeRO-2 gradients exist only here."""

    @abstractmethod
    def observe(self, engine: Engine, state: TrainState) -> Seen:
        """What there is to see after the update; the values count on rank 0."""
