"""What a run needs of a machine at least: arithmetic on its settings, without building anything."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.checkpoint.retention import PROTECTED
from ds_gpt2.config.settings import CheckpointSettings, Settings
from ds_gpt2.model.shape import CHECKPOINT_BYTES, WEIGHT_BYTES, ModelShape

MANY_EPOCHS = 20  # from which on a model memorizes its data

_REPLICATED_BYTES = 6  # a parameter on every rank: bf16 weights, fp32 gradients
_SHARED_BYTES = 16  # a parameter, shared out among the ranks: fp32 masters, two moments, reduced gradients
_LIBRARIES = 250_000_000  # bytes that torch and DeepSpeed take in a rank: benchmarks/results/README.md


@dataclass(frozen=True)
class Storage:
    """Bytes of the disk that holds the checkpoints."""

    checkpoint: int  # one that can be resumed from
    last: int  # how many rolling ones are kept for being new
    most: int  # all that the settings keep, one being written, and what must stay free
    least: int  # what retention cannot do without


def parameters(settings: Settings) -> int:
    """Of the model, the padding rows of the vocabulary included."""
    return ModelShape(*settings.model.shape, settings.batch.sequence_length).parameters


def storage(settings: Settings, steps: int | None, epochs: float | None) -> Storage:
    """
    Args:
        steps: of the whole run; None where they follow from data that cannot be read.
        epochs: that those steps come to; None likewise.
    """
    checkpoint = settings.checkpoint
    full = checkpoint_bytes(settings)
    weights = WEIGHT_BYTES * parameters(settings)
    ends = int(epochs or 0)
    if checkpoint.keep_epochs != "all":
        ends = min(ends, checkpoint.keep_epochs)
    best = int(checkpoint.keep_best and settings.validation.every > 0)
    last, for_good = _rolling(checkpoint, steps)
    total = (last + for_good + 1) * full
    total += ends * (weights if checkpoint.epochs_as == "weights" else full)
    total += best * (weights if checkpoint.best_as == "weights" else full)
    free = int(checkpoint.min_free_gb * 1e9)
    return Storage(full, last, total + free, min(total, (PROTECTED + best + 1) * full) + free)


def checkpoint_bytes(settings: Settings) -> int:
    """Of one checkpoint that can be resumed from."""
    return CHECKPOINT_BYTES * parameters(settings)


def largest_file(settings: Settings, ranks: int) -> int:
    """Bytes of the largest file of a checkpoint: a rank's partition, or all bf16 weights."""
    return parameters(settings) * max(2, -(-12 // ranks))


def gpu_memory(settings: Settings, ranks: int) -> int:
    """Bytes on each GPU before the first activation; the real need is larger."""
    return parameters(settings) * (_REPLICATED_BYTES + -(-_SHARED_BYTES // ranks))


def host_memory(settings: Settings, accelerator: str, ranks: int) -> int:
    """Bytes of all ranks together, activations left out: libraries, the copy being saved, on the CPU the state too."""
    need = ranks * _LIBRARIES
    if settings.checkpoint.in_background:
        need += checkpoint_bytes(settings)
    if accelerator == "cpu":
        need += parameters(settings) * (ranks * _REPLICATED_BYTES + _SHARED_BYTES)
    return need


def _rolling(checkpoint: CheckpointSettings, steps: int | None) -> tuple[int, int]:
    """How many rolling checkpoints there are at most: for being new, and for good."""
    if steps is None:
        return checkpoint.keep_last, 0
    saves = -(-steps // checkpoint.every) if checkpoint.every else 1
    last = min(saves, checkpoint.keep_last)
    return last, min(saves - last, steps // checkpoint.keep_every if checkpoint.keep_every else 0)
