"""What the loop asks of an observer."""

from __future__ import annotations

from typing import Protocol

from ds_gpt2.engine import Engine
from ds_gpt2.monitor import Seen
from ds_gpt2.schedule import Every
from ds_gpt2.state import TrainState


class Hook(Protocol):
    """Runs on every rank after the updates at which it is due."""

    every: Every

    def observe(self, engine: Engine, state: TrainState) -> Seen:
        """What there is to see now; the values count on rank 0."""
        ...
