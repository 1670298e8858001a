"""The DeepSpeed engine behind the few methods that a training loop needs."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import safe_set_full_fp32_param
from pydantic import ValidationError

from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.data.loader import MicroBatch
from ds_gpt2.distributed import collectives
from ds_gpt2.engine import internals
from ds_gpt2.engine.checkpoint_io import Serializer, partition_file
from ds_gpt2.engine.checkpoint_keys import EMA, MASTERS, STATE
from ds_gpt2.engine.ema import WeightAverage, set_model_weights
from ds_gpt2.engine.monitors import Monitors
from ds_gpt2.engine.rng_state import get_rng_state, set_rng_state
from ds_gpt2.engine.zero2_gradients import GradientCheck, sum_gradients_in_fp32
from ds_gpt2.model.gpt2 import GPT2, parameter_groups


@dataclass(frozen=True)
class Update:
    """The result of one optimizer update."""

    applied: bool  # False: the update was skipped, because a gradient is Inf or NaN or on request
    grad_norm: float  # global norm before clipping; Inf or NaN if a gradient is, or if the caller skips the update
    clipped: bool  # the gradient was scaled down to optimizer.grad_clip


class Engine:
    """A GPT-2 under ZeRO: bf16 weights, fp32 master weights and moments partitioned over the ranks."""

    def __init__(
        self, model: GPT2, deepspeed_config: dict[str, Any], weight_decay: float, ema_decay: float | None = None
    ) -> None:
        """
        Args:
            deepspeed_config: complete, see ``deepspeed_config.complete``.
            weight_decay: of matrices and embeddings; biases and norms have none.
            ema_decay: of the moving average of the weights; None: there is none.

        Raises:
            UserError: DeepSpeed rejects its configuration, or this version lacks an internal that is used.
        """
        groups = parameter_groups(model, weight_decay)
        try:
            self.deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=deepspeed_config)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"DeepSpeed rejects its configuration: {one_line_reason(error)}") from None
        collectives.call_on_all_ranks(lambda: internals.check(self.deepspeed, model))
        self.model = model
        self.monitors = Monitors(self.deepspeed.monitor)
        sum_gradients_in_fp32(model, self.deepspeed.optimizer)
        self._check = GradientCheck(self.deepspeed.optimizer)
        self._serializer = Serializer()
        self.deepspeed.checkpoint_engine = self._serializer
        self.deepspeed._copy_recovery_script = lambda _: None  # at every save; checkpoint/directory.py copies it once
        self._constants = self._read_constants()
        self._snapshot: threading.Event | None = None
        self.average = WeightAverage(self._master_parts(), ema_decay) if ema_decay is not None else None

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    def accumulate(
        self, micro_batches: Iterable[MicroBatch], interrupted: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Compute loss and gradients of this rank's micro-batches of a step, without an update.

        Args:
            interrupted: called between micro-batches, with the same result on all ranks; True discards the step and
                restores the random state.

        Returns:
            This rank's mean loss, fp32 scalar on the device; nothing here waits for the device. None if interrupted:
            then no update may follow.
        """
        engine = self.deepspeed
        self._random_before = get_rng_state()
        engine.train()
        engine.set_gradient_accumulation_boundary(True)
        losses = None
        with engine.coalesce_grad_reduction():  # reduces the gradients that exist, also after an exception
            try:
                losses = self._backward(micro_batches, interrupted)
            finally:
                if losses is None:
                    self.model.zero_grad()
        return torch.stack(losses).mean() if losses is not None else None

    def _backward(
        self, micro_batches: Iterable[MicroBatch], interrupted: Callable[[], bool]
    ) -> list[torch.Tensor] | None:
        losses: list[torch.Tensor] = []
        for number, (tokens, targets) in enumerate(micro_batches, start=1):
            if number > 1 and interrupted():
                set_rng_state(self._random_before)
                return None
            loss = self.deepspeed(tokens, targets)
            self.deepspeed.backward(loss)
            losses.append(loss.detach())
        return losses

    def apply(self, lr: float, accept: Callable[[float], bool] = lambda norm: True) -> Update:
        """Clip the gradients, update the weights and zero the gradients; skip the update if one is not finite.

        Args:
            accept: called with the global norm before clipping if it is finite; False on all ranks skips the update.
        """
        engine = self.deepspeed
        self._check.accept = accept
        self._wait_for_snapshot()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.step()
        applied, norm, limit = engine.was_step_applied(), self._check.norm, self._clip_norm
        if applied and self.average is not None:
            self.average.update(self._master_parts())
        return Update(applied, norm, clipped=applied and 0 < limit < norm)

    def skip_update(self, lr: float) -> Update:
        """Make no update of the accumulated gradients, on any rank.

        DeepSpeed has no call for this. Inf in the gradients makes it skip the update as after an overflow, and keep
        all of its counters consistent.
        """
        for part in self.gradients().values():
            part[:1] = float("inf")
        return self.apply(lr)

    def discard_step(self) -> None:
        """Drop the accumulated gradients on all ranks; weights, optimizer and random state are as before the step."""
        self.skip_update(0.0)
        set_rng_state(self._random_before)

    def save_checkpoint(self, directory: Path, tag: str, client_state: dict[str, Any]) -> dict[str, Any]:
        """Return what DeepSpeed saves on this rank, by file name; nothing is written. Every rank calls this.

        Tensors are the engine's own: valid until the next update (see ``hold_updates_until``).
        """
        self.deepspeed.save_checkpoint(str(directory), tag=tag, client_state=client_state, save_latest=False)
        saved = self._serializer.take_saved()
        if self.average is not None:
            partition = saved[partition_file(collectives.rank())]
            partition[EMA] = self.average.to_save(partition[STATE][MASTERS])
        return saved

    def load_checkpoint(self, directory: Path, tag: str, contents: dict[str, Any]) -> dict[str, Any]:
        """Restore the engine from ``contents``, as ``save_checkpoint`` returned them, and return the client state.

        Clipping and optimizer constants stay those of the settings. A moving average that ``contents`` do not have
        starts from the restored weights. Every rank calls this; nothing is read from disk.

        Raises:
            Exception: any exception that DeepSpeed raises if it rejects the contents.
        """
        self._serializer.offer(contents)
        try:
            path, client_state = self.deepspeed.load_checkpoint(str(directory), tag=tag, load_lr_scheduler_states=False)
            assert path is not None, "DeepSpeed found no checkpoint to load"
        finally:
            self._serializer.offer({})
        self._restore_constants()
        if self.average is not None:
            if (saved := contents[partition_file(collectives.rank())].get(EMA)) is not None:
                self.average.load(saved)
            else:
                self.average.restart(self._master_parts())
        return dict(client_state)

    def use_averaged_weights(self) -> None:
        """Set the model's weights to the moving average, rounded to their dtype, until ``use_trained_weights``.

        Waits until a checkpoint in progress has been copied. Every rank calls this; there must be an average.
        """
        assert self.average is not None
        self._wait_for_snapshot()
        set_model_weights(self.deepspeed.optimizer, self.average.parts)

    def use_trained_weights(self) -> None:
        """Set the model's weights to those of the last update again, to the last bit. Every rank calls this."""
        set_model_weights(self.deepspeed.optimizer, self._master_parts())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors of a full checkpoint."""
        return self.model.shape.checkpoint_bytes(self.average is not None)

    def partition_sizes(self) -> list[int]:
        """Return the number of elements of this rank's partition of each parameter group, padding included."""
        return [part.numel() for part in self._master_parts()]

    def _master_parts(self) -> list[torch.Tensor]:
        """Return this rank's part of the master weights of each parameter group, fp32, 1-D, padding included."""
        return list(self.deepspeed.optimizer.single_partition_of_fp32_groups)

    def has_finite_weights(self) -> bool:
        """Return whether all of this rank's weights are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def record_event(self) -> torch.cuda.Event | None:
        """Record an event after all work queued on the GPU so far; None on a CPU, where no work is queued."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def masters(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of each parameter's master weights, fp32, 1-D, by parameter name.

        Parameters of which this rank has no element are omitted.
        """
        mappings = ((name, parameter._hp_mapping) for name, parameter in self.model.named_parameters())  # type: ignore[attr-defined]  # DeepSpeed's
        return {name: mapping.get_hp_fragment() for name, mapping in mappings if mapping is not None}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the same parts of the gradients, fp32, 1-D, averaged over ranks and micro-batches, before clipping.

        They exist only between a step's last backward pass and its update.
        """
        parts = {}
        for name, parameter in self.model.named_parameters():
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if mapping is not None:
                part = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]  # DeepSpeed's
                address = mapping.lp_fragment_address
                parts[name] = part if len(part) == address.numel else part.narrow(0, address.start, address.numel)
        return parts

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the master weights to ``weights`` (fp32, by parameter name) and the bf16 weights to their rounded values.

        Rows that ``weights`` do not have (padding of the vocabulary) stay as they are. The moving average, if there is
        one, starts from these weights.
        """
        for name, parameter in self.model.named_parameters():
            value = parameter.float()
            value[: len(weights[name])] = weights[name]
            parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        if self.average is not None:
            self.average.restart(self._master_parts())

    def fingerprint(self) -> str:
        """Return a hash of this rank's bf16 weights; it differs if any single bit differs.

        Computed on the device: per tensor, the sum of the weights' bit patterns.
        """
        sums = [parameter.detach().view(torch.int16).sum(dtype=torch.int64) for parameter in self.model.parameters()]
        return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()[:16]

    def hold_updates_until(self, snapshot: threading.Event) -> None:
        """Make the next change of the weights wait until ``snapshot`` is set: until the state has been copied."""
        self._snapshot = snapshot

    def _wait_for_snapshot(self) -> None:
        if self._snapshot is not None:
            self._snapshot.wait()
            self._snapshot = None

    def close(self) -> None:
        """Free the engine's buffers. Does nothing if DeepSpeed's modules are gone because the project was moved."""
        with contextlib.suppress(ImportError):
            self.deepspeed.destroy()

    @property
    def _clip_norm(self) -> float:
        return self._constants[1]

    def _read_constants(self) -> tuple[list[dict[str, Any]], float]:
        """Return the constants of each parameter group, without the learning rate, and the clipping norm."""
        optimizer = self.deepspeed.optimizer
        changing = ("params", "lr")
        groups = [
            {key: value for key, value in group.items() if key not in changing} for group in optimizer.param_groups
        ]
        return groups, optimizer.clip_grad

    def _restore_constants(self) -> None:
        """Set the settings' clipping and optimizer constants again in place of those that a checkpoint contained."""
        groups, self.deepspeed.optimizer.clip_grad = self._constants
        for group, constants in zip(self.deepspeed.optimizer.param_groups, groups, strict=True):
            group.update(constants)
