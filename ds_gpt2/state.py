"""The progress of a run: one small object, the only thing besides weights and RNG that a resume needs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any

_CLIPPED_SHARE = 0.01  # weight of the newest update


@dataclass
class TrainState:
    """What a run has done so far. The data position is not stored: it is a pure function of ``step``."""

    step: int = 0  # optimizer updates attempted, skipped ones included
    tokens: int = 0  # training tokens seen, over all ranks
    clipped_share: float = 0.0  # of updates whose gradient was clipped, over about the last hundred
    skipped_steps: int = 0  # updates skipped because a gradient was Inf or NaN
    val_loss: float | None = None  # the newest validation loss, nats per token
    val_step: int | None = None  # when it was measured
    best_val_loss: float | None = None
    best_step: int | None = None
    ledger: str = ""  # a hash over the windows of every step so far, in order: equal for runs that saw the same data

    def advance(self, tokens: int, applied: bool, windows: bytes, clipped: bool = False) -> None:
        """Count one step of ``tokens`` tokens from ``windows``; ``applied`` is False when the update was skipped."""
        self.step += 1
        self.ledger = hashlib.sha256(self.ledger.encode() + windows).hexdigest()
        self.tokens += tokens
        self.skipped_steps += not applied
        self.clipped_share += (clipped - self.clipped_share) * _CLIPPED_SHARE

    def validated(self, loss: float) -> None:
        """Take in a validation loss."""
        self.val_loss, self.val_step = loss, self.step
        if self.best_val_loss is None or loss < self.best_val_loss:
            self.best_val_loss, self.best_step = loss, self.step

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers only, fit for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of ``to_dict``; fields of newer versions are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
