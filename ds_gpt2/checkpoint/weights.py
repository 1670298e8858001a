"""Extract the fp32 weights of a checkpoint from the partitions of its ranks: 4 bytes per parameter instead of 14."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import torch

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk, write_file
from ds_gpt2.checkpoint.manifest import DamagedError, encode, read
from ds_gpt2.checkpoint.naming import MANIFEST, PARTIAL
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file, pickle_into, unpickle
from ds_gpt2.engine.checkpoint_keys import MASTERS, PARAM_SHAPES, STATE

WEIGHTS_FILE = "fp32_weights.pt"  # parameter name to fp32 tensor; torch.load(weights_only=True) reads it


def fp32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every parameter by name, in fp32, on the CPU, from a full checkpoint or one with weights only.

    Needs 4 bytes of memory per parameter: the files are memory-mapped and read one after the other.

    Raises:
        DamagedError, OSError, pickle.UnpicklingError: the checkpoint cannot be read.
    """
    manifest = read(checkpoint)
    if manifest.kind == "weights":
        return unpickle(checkpoint / WEIGHTS_FILE)
    groups = unpickle(checkpoint / MODEL_FILE, mapped=True)[PARAM_SHAPES]
    weights = {name: torch.empty(tuple(shape)) for shapes in groups for name, shape in shapes.items()}
    starts = [0] * len(groups)
    for rank in range(manifest.world_size):
        state = unpickle(checkpoint / partition_file(rank), mapped=True)[STATE]
        for group, part in enumerate(state[MASTERS]):
            _fill([weights[name] for name in groups[group]], starts[group], part)
            starts[group] += part.numel()
    if short := [name for shapes, end in zip(groups, starts, strict=True) for name in _beyond(shapes, end)]:
        raise DamagedError(f"its files have no values for {short[0]}")
    return weights


def save_weights(disk: Disk, source: Path, directory: Path, tag: str) -> None:
    """Create the checkpoint ``tag`` with only the fp32 weights of ``source``; training cannot resume from it.

    Raises:
        DamagedError, OSError, pickle.UnpicklingError: ``source`` cannot be read, or ``tag`` not written.
    """
    unfinished = directory / (tag + PARTIAL)
    commit.discard(disk, unfinished)
    disk.make_directory(unfinished)
    fill = partial(pickle_into, fp32_weights(source))
    entry = commit.write_with(disk, unfinished / WEIGHTS_FILE, 0.0, fill)
    manifest = read(source).model_copy(update={"kind": "weights", "files": {WEIGHTS_FILE: entry}})
    write_file(disk, unfinished / MANIFEST, encode(manifest))
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
