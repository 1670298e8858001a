"""The progress of a run: one small object, the only thing besides weights and RNG that a resume needs."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ENOUGH_LOSSES = 30  # recent ones, for a new one to be compared with
_CLIPPED_SHARE = 0.01  # weight of the newest update


@dataclass
class TrainState:
    """What a run has done so far, and what its guards remember."""

    step: int = 0  # optimizer updates attempted, skipped ones included
    batch: int = 0  # number of the newest batch of the data: as ``step``, but for those that were left out
    previous_batch: int = 0  # the one trained on before ``batch``
    left_out: list[int] = field(default_factory=list)  # batches that are never trained on, ascending
    tokens: int = 0  # training tokens seen, over all ranks
    clipped_share: float = 0.0  # of updates whose gradient was clipped, over about the last hundred
    skipped_steps: int = 0  # updates skipped because a gradient was Inf or NaN
    val_loss: float | None = None  # the newest finite validation loss, nats per token
    val_step: int | None = None  # when it was measured
    best_val_loss: float | None = None  # finite
    best_step: int | None = None
    ledger: str = ""  # a hash over the windows of every step so far, in order: equal for runs that saw the same data
    recent_losses: list[float] = field(default_factory=list)  # the newest ones that were not too high
    high_losses: int = 0  # losses far above them, one after another, up to now
    high_batches: list[int] = field(default_factory=list)  # the batches of the data that they came from
    skipped_in_row: int = 0  # updates skipped one after another, up to now
    weights: str = ""  # fingerprint of the weights at the last save
    weights_updates: int = 0  # updates made until then
    unevaluated: dict[str, Any] | None = None  # what was seen at this step if its evaluation was interrupted

    @property
    def next_batch(self) -> int:
        """The batch of the data that the next step is to train on."""
        batch = self.batch + 1
        at = bisect.bisect_left(self.left_out, batch)
        while at < len(self.left_out) and self.left_out[at] == batch:
            at, batch = at + 1, batch + 1
        return batch

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation of this step is complete, if one was due; False if it was interrupted."""
        return self.unevaluated is None

    @property
    def recorded_step(self) -> int:
        """The newest step whose evaluation is complete, and which is therefore recorded."""
        return self.step if self.is_evaluated else self.step - 1

    @property
    def updates(self) -> int:
        """Updates made, skipped ones left out."""
        return self.step - self.skipped_steps

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is suspected, and there are enough losses to compare with for that to mean something."""
        return not self.high_losses and not self.skipped_in_row and len(self.recent_losses) >= ENOUGH_LOSSES

    def leave_out(self, batches: Iterable[int]) -> None:
        """Never train on ``batches``."""
        self.left_out = sorted({*self.left_out, *batches})

    def advance(self, tokens: int, applied: bool, windows: bytes, clipped: bool = False) -> None:
        """Count one step of ``tokens`` tokens from ``windows``; ``applied`` is False when the update was skipped."""
        self.previous_batch, self.batch = self.batch, self.next_batch
        self.step += 1
        self.ledger = hashlib.sha256(self.ledger.encode() + windows).hexdigest()
        self.tokens += tokens
        self.skipped_steps += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        self.clipped_share += (clipped - self.clipped_share) * _CLIPPED_SHARE

    def validated(self, loss: float) -> None:
        """Record the validation loss of this step. A loss that is NaN or infinite is never the newest or the best."""
        if not math.isfinite(loss):
            return
        self.val_loss, self.val_step = loss, self.step
        if self.best_val_loss is None or loss < self.best_val_loss:
            self.best_val_loss, self.best_step = loss, self.step

    def forget_validation_since(self, before: TrainState) -> None:
        """Take back what ``validated`` has recorded since ``before``, a copy of this state."""
        self.val_loss, self.val_step = before.val_loss, before.val_step
        self.best_val_loss, self.best_step = before.best_val_loss, before.best_step

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of ``to_dict``; fields of newer versions are ignored.

        Earlier versions could store NaN as the newest or the best validation loss: it is dropped.
        """
        known = {each.name for each in fields(cls)}
        values = {"batch": values.get("step", 0), **values}  # before batches could be left out the two were one
        state = cls(**{name: value for name, value in values.items() if name in known})
        if state.val_loss is not None and not math.isfinite(state.val_loss):
            state.val_loss = state.val_step = None
        if state.best_val_loss is not None and not math.isfinite(state.best_val_loss):
            state.best_val_loss = state.best_step = None
        return state
