"""The progress of a run: together with weights, optimizer and random state, everything that a resume needs."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ENOUGH_LOSSES = 30  # recent losses that a new one is compared with, at least
_CLIPPED_SHARE = 0.01  # weight of the newest update


@dataclass
class TrainState:
    """The progress of a run, and the memory of its guards. Field names are part of the checkpoint format."""

    step: int = 0  # optimizer updates attempted, skipped ones included
    batch: int = 0  # number of the newest batch of the data: equals ``step`` unless batches were left out
    previous_batch: int = 0  # the batch trained on before ``batch``
    left_out: list[int] = field(default_factory=list)  # batches excluded from training, ascending
    tokens: int = 0  # training tokens seen, over all ranks
    clipped_share: float = 0.0  # share of updates whose gradient was clipped, over about the last hundred
    skipped_steps: int = 0  # updates skipped because a gradient was Inf or NaN
    val_loss: float | None = None  # the newest finite validation loss, nats per token
    val_step: int | None = None  # the step at which it was measured
    best_val_loss: float | None = None  # finite
    best_step: int | None = None
    ledger: str = ""  # hash over the windows of every step so far, in order: equal for runs that saw the same data
    recent_losses: list[float] = field(default_factory=list)  # the newest losses without spikes
    recent_norms: list[float] = field(default_factory=list)  # the newest finite norms of the gradients
    high_losses: int = 0  # spikes in a row, up to this step
    high_batches: list[int] = field(default_factory=list)  # the batches of the data with these spikes
    skipped_in_row: int = 0  # updates skipped in a row, up to this step
    weights: str = ""  # fingerprint of the weights at the last save
    weights_updates: int = 0  # updates applied until then
    unevaluated: dict[str, Any] | None = None  # metrics of this step so far, if its evaluation was interrupted

    @property
    def next_batch(self) -> int:
        """The batch of the data that the next step trains on."""
        batch = self.batch + 1
        index = bisect.bisect_left(self.left_out, batch)
        while index < len(self.left_out) and self.left_out[index] == batch:
            index, batch = index + 1, batch + 1
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
        """The number of applied updates: steps without the skipped ones."""
        return self.step - self.skipped_steps

    @property
    def is_healthy(self) -> bool:
        """Whether no anomaly is in progress, and there are enough losses to detect one."""
        return not self.high_losses and not self.skipped_in_row and len(self.recent_losses) >= ENOUGH_LOSSES

    def exclude(self, batches: Iterable[int]) -> None:
        """Exclude ``batches`` of the data from training, apart from those that were trained on already."""
        self.left_out = sorted({*self.left_out, *(batch for batch in batches if batch > self.batch)})

    def advance(self, tokens: int, applied: bool, windows: bytes, clipped: bool = False) -> None:
        """Count one step.

        Args:
            tokens: of the step, over all ranks.
            applied: False if the update was skipped.
            windows: the step's window numbers, as bytes, for ``ledger``.
        """
        self.previous_batch, self.batch = self.batch, self.next_batch
        self.step += 1
        self.ledger = hashlib.sha256(self.ledger.encode() + windows).hexdigest()
        self.tokens += tokens
        self.skipped_steps += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        self.clipped_share += (clipped - self.clipped_share) * _CLIPPED_SHARE

    def is_best(self, loss: float) -> bool:
        """Return whether a validation loss of ``loss`` would be the best so far; NaN and infinity never are."""
        return math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss)

    def record_validation(self, loss: float) -> None:
        """Record the validation loss of this step. NaN and infinity are neither the newest nor the best."""
        if self.is_best(loss):
            self.best_val_loss, self.best_step = loss, self.step
        if math.isfinite(loss):
            self.val_loss, self.val_step = loss, self.step

    def restore_validation(self, before: TrainState) -> None:
        """Undo what ``record_validation`` has recorded since ``before``, a copy of this state."""
        self.val_loss, self.val_step = before.val_loss, before.val_step
        self.best_val_loss, self.best_step = before.best_val_loss, before.best_step

    def forget_best_before(self, step: int) -> None:
        """Forget a best validation loss from before ``step``, at which the run was forked from another.

        The other run has that checkpoint. A validation loss of ``step`` itself is then the best.
        """
        if self.best_step is None or self.best_step >= step:
            return
        is_of_step = self.val_step == step
        self.best_val_loss, self.best_step = (self.val_loss, self.val_step) if is_of_step else (None, None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Return the state that ``to_dict`` wrote; fields of newer versions are ignored.

        Earlier versions could store NaN as the newest or the best validation loss: it is dropped.
        """
        known = {each.name for each in fields(cls)}
        values = {"batch": values.get("step", 0), **values}  # versions that could not exclude batches had no ``batch``
        state = cls(**{name: value for name, value in values.items() if name in known})
        if state.val_loss is not None and not math.isfinite(state.val_loss):
            state.val_loss = state.val_step = None
        if state.best_val_loss is not None and not math.isfinite(state.best_val_loss):
            state.best_val_loss = state.best_step = None
        return state
