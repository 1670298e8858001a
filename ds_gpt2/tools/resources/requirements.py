"""Minimum requirements of a run: arithmetic on its settings, nothing is built."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.checkpoint.retention import PROTECTED
from ds_gpt2.checkpoint.space import reserved_bytes
from ds_gpt2.config.settings import Settings
from ds_gpt2.model.shape import ModelShape, sharded_bytes
from ds_gpt2.tools.resources.checkpoint_space import max_kept

MANY_EPOCHS = 20  # a model memorizes its data from about this number on

_REPLICATED_BYTES = 6  # per parameter on every rank: bf16 weights, fp32 gradients
_REDUCED_BYTES = 4  # per parameter, divided among the ranks: reduced fp32 gradients
# Bytes of torch and DeepSpeed in each rank, at least (benchmarks/results/README.md); plan/fit.py has the usual value.
_MIN_LIBRARY_BYTES = 250_000_000


@dataclass(frozen=True)
class DiskRequirement:
    """Bytes required on the disk of the checkpoints, and the number of rolling checkpoints."""

    checkpoint: int  # bytes of one full checkpoint
    rolling: int  # number of rolling checkpoints that ``checkpoint.keep_last`` keeps
    maximum: int  # bytes of all that the settings keep, of the checkpoint being written, and of the reserve
    minimum: int  # bytes that retention requires at least


def disk_requirement(settings: Settings, steps: int | None, epochs: float | None) -> DiskRequirement:
    """Return the disk space that the checkpoints of a run need.

    Args:
        steps: steps of the whole run; None if they follow from data that cannot be read.
        epochs: the same in epochs; None likewise.
    """
    checkpoint = settings.checkpoint
    full, weights = checkpoint_bytes(settings), _shape(settings).weight_bytes(settings.ema.is_on)
    has_best = checkpoint.keep_best and settings.validation.every > 0
    rolling = checkpoint.keep_last
    if steps is not None:
        rolling = -(-steps // checkpoint.every) if checkpoint.every else 1
    kept = max_kept(checkpoint, steps or 0, rolling, int(epochs or 0), has_best)
    total, reserve = kept.bytes(full, weights) + full, reserved_bytes(checkpoint)
    minimum = min(total, (PROTECTED + has_best + 1) * full)
    return DiskRequirement(full, min(rolling, checkpoint.keep_last), total + reserve, minimum + reserve)


def checkpoint_bytes(settings: Settings) -> int:
    """Return the bytes of one full checkpoint."""
    return _shape(settings).checkpoint_bytes(settings.ema.is_on)


def largest_file(settings: Settings, ranks: int) -> int:
    """Return the bytes of the largest file of a checkpoint: the partition of a rank, or all bf16 weights."""
    return _shape(settings).parameters * max(2, -(-sharded_bytes(settings.ema.is_on) // ranks))


def gpu_memory(settings: Settings, ranks: int) -> int:
    """Return the bytes on each GPU without activations; a run requires more."""
    return _shape(settings).parameters * (_REPLICATED_BYTES + -(-_state_bytes(settings) // ranks))


def host_memory(settings: Settings, accelerator: str, ranks: int, world_size: int | None = None) -> int:
    """Return the host memory of the ranks of one host in bytes, without activations.

    It holds the libraries, the copy of the state while it is saved, and on the CPU also the state itself.

    Args:
        ranks: on the host.
        world_size: ranks on all hosts, which share the optimizer state; None: there are no others.
    """
    share = ranks / (world_size or ranks)
    needed = float(ranks * _MIN_LIBRARY_BYTES)
    if settings.checkpoint.in_background:
        needed += share * checkpoint_bytes(settings)
    if accelerator == "cpu":
        needed += _shape(settings).parameters * (ranks * _REPLICATED_BYTES + share * _state_bytes(settings))
    return round(needed)


def _state_bytes(settings: Settings) -> int:
    """Return the bytes per parameter that the ranks share during a step."""
    return sharded_bytes(settings.ema.is_on) + _REDUCED_BYTES


def _shape(settings: Settings) -> ModelShape:
    return ModelShape(*settings.model.shape, settings.batch.sequence_length)
