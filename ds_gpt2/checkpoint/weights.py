"""Extract the fp32 weights of a checkpoint from the partitions of its ranks: 4 bytes per parameter instead of 14."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import torch

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk, write_file
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest, Weights, encode, read
from ds_gpt2.checkpoint.naming import MANIFEST, PARTIAL
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file, pickle_into, unpickle
from ds_gpt2.engine.checkpoint_keys import EMA, MASTERS, PARAM_SHAPES, STATE

WEIGHTS_FILE = "fp32_weights.pt"  # parameter name to fp32 tensor; torch.load(weights_only=True) reads it
EMA_FILE = "fp32_ema_weights.pt"  # the same of the moving average, if the run keeps one
_FILES: dict[Weights, str] = {"raw": WEIGHTS_FILE, "ema": EMA_FILE}


def files_of_weights(manifest: Manifest) -> dict[Weights, str]:
    """Return the names of the files of a checkpoint with weights only, by what they contain."""
    return {kind: name for kind, name in _FILES.items() if kind == "raw" or manifest.has_ema}


def fp32_weights(checkpoint: Path, kind: Weights = "raw") -> dict[str, torch.Tensor]:
    """Return every parameter by name, in fp32, on the CPU, from a full checkpoint or one with weights only.

    Needs 4 bytes of memory per parameter: the files are memory-mapped and read one after the other.

    Raises:
        DamagedError, OSError, pickle.UnpicklingError: the checkpoint cannot be read, or has no such weights.
    """
    manifest = read(checkpoint)
    if kind == "ema" and not manifest.has_ema:
        raise DamagedError("it has no moving average of the weights")
    if manifest.kind == "weights":
        return unpickle(checkpoint / _FILES[kind])
    groups = unpickle(checkpoint / MODEL_FILE, mapped=True)[PARAM_SHAPES]
    weights = {name: torch.empty(tuple(shape)) for shapes in groups for name, shape in shapes.items()}
    starts = [0] * len(groups)
    for rank in range(manifest.world_size):
        content = unpickle(checkpoint / partition_file(rank), mapped=True)
        for group, part in enumerate(content[EMA] if kind == "ema" else content[STATE][MASTERS]):
            _fill([weights[name] for name in groups[group]], starts[group], part)
            starts[group] += part.numel()
    if short := [name for shapes, end in zip(groups, starts, strict=True) for name in _beyond(shapes, end)]:
        raise DamagedError(f"its files have no values for {short[0]}")
    return weights


def save_weights(disk: Disk, source: Path, directory: Path, tag: str) -> None:
    """Create the checkpoint ``tag`` with only the fp32 weights of ``source``, and their moving average if it has one.

    Training cannot resume from it.

    Raises:
        DamagedError, OSError, pickle.UnpicklingError: ``source`` cannot be read, or ``tag`` not written.
    """
    unfinished = directory / (tag + PARTIAL)
    commit.discard(disk, unfinished)
    disk.make_directory(unfinished)
    manifest = read(source)
    files = {
        name: commit.write_with(disk, unfinished / name, 0.0, partial(pickle_into, fp32_weights(source, kind)))
        for kind, name in files_of_weights(manifest).items()
    }
    reduced = manifest.model_copy(update={"kind": "weights", "files": files})
    write_file(disk, unfinished / MANIFEST, encode(reduced))
    disk.sync_directory(unfinished)
    commit.publish(disk, directory, tag)


def _beyond(shapes: dict[str, torch.Size], end: int) -> list[str]:
    """Return the parameters that do not fit completely into a flat vector of ``end`` elements."""
    ends = itertools.accumulate(math.prod(shape) for shape in shapes.values())
    return [name for name, needed in zip(shapes, ends, strict=True) if needed > end]


def _fill(tensors: list[torch.Tensor], start: int, part: torch.Tensor) -> None:
    """Copy ``part``, which begins at element ``start`` of the concatenated ``tensors``, into the tensors."""
    offset = -start
    for tensor in tensors:
        begin, end = max(0, offset), min(part.numel(), offset + tensor.numel())
        if begin < end:
            tensor.view(-1)[begin - offset : end - offset] = part[begin:end]
        offset += tensor.numel()
