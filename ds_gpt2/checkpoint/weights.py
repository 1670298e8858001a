"""The fp32 weights of a checkpoint, put together from the ranks' partitions: 4 bytes a parameter instead of 14."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.disk import Disk, write_file
from ds_gpt2.checkpoint.layout import MANIFEST, PARTIAL
from ds_gpt2.checkpoint.manifest import encode, read
from ds_gpt2.checkpoint.serializer import MODEL_FILE, partition_file, pickle_into, unpickle

WEIGHTS_FILE = "fp32_weights.pt"  # parameter name to fp32 tensor; torch.load(weights_only=True) reads it


def fp32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter by name, fp32, on the CPU, from a whole checkpoint of any number of ranks.

    Raises:
        DamagedError, OSError, pickle.UnpicklingError: it cannot be read.
    """
    model = unpickle(checkpoint / MODEL_FILE)
    ranks = range(read(checkpoint).world_size)
    partitions = [unpickle(checkpoint / partition_file(rank))["optimizer_state_dict"] for rank in ranks]
    weights: dict[str, torch.Tensor] = {}
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([part["single_partition_of_fp32_groups"][group] for part in partitions])
        weights |= _cut(flat, shapes)
    return weights


def keep_weights(disk: Disk, source: Path, directory: Path, tag: str) -> None:
    """Make ``tag`` hold the fp32 weights of checkpoint ``source``, and nothing that could be resumed from."""
    unfinished = directory / (tag + PARTIAL)
    commit.discard(disk, unfinished)
    disk.make_directory(unfinished)
    fill = partial(pickle_into, fp32_weights(source))
    entry = commit.write_with(disk, unfinished / WEIGHTS_FILE, 0.0, fill)
    manifest = read(source).model_copy(update={"kind": "weights", "files": {WEIGHTS_FILE: entry}})
    write_file(disk, unfinished / MANIFEST, encode(manifest))
    disk.sync_directory(unfinished)
    commit.publish(disk, directory, tag)


def _cut(flat: torch.Tensor, shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    pieces = flat[: sum(sizes)].split(sizes)
    return {name: piece.reshape(tuple(shape)) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
