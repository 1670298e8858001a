"""Choose checkpoints of a run, and compute the mean of their weights."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.manifest import Manifest, Weights
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.checkpoint.verify import Verdict, examine, hashing
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.tools.models.open import OpenedModel, check_memory, open_verified, shape_of
from ds_gpt2.tools.resources.run_checkpoints import RunCheckpoints, find_checkpoint, find_run_checkpoints

_BYTES_OF_SUM = 8  # per weight: the sum is in fp64


def choose_checkpoints(
    run: str | None, which: str, kind: Weights, warn: Callable[[str], None]
) -> tuple[Generation, ...]:
    """Return two or more verified checkpoints of a run, of different steps, the newest first.

    Args:
        run: see ``find_run_checkpoints``.
        which: a number N, for the newest N full checkpoints; or two or more tags or steps, separated by commas, which
            may be checkpoints with weights only.
        kind: the weights that the checkpoints must have.
        warn: called with the reason for each newest checkpoint that is skipped.

    Raises:
        UserError: there are no such checkpoints, one that is named cannot be used, or their models differ in shape.
    """
    if run is not None and (Path(run) / MANIFEST).is_file():
        raise UserError(f"--average {which}: {run} is a single checkpoint: give its run, or a directory of checkpoints")
    if which.isascii() and which.isdigit():
        found = _newest(find_run_checkpoints(run), int(which), kind, warn)
    else:
        found = _named(run, which, kind)
    shapes = {shape_of(_manifest(one)) for one in found}
    if len(shapes) > 1:
        raise UserError(f"--average {which}: the checkpoints have models of different shapes; give those of one model")
    return tuple(sorted(found, key=lambda one: -one.step))


def mean_model(chosen: Sequence[Generation], kind: Weights) -> OpenedModel:
    """Return the mean of the checkpoints' weights, and everything else of the first checkpoint.

    The sum is in fp64, so that the mean is rounded to fp32 once. One checkpoint is read at a time: 13 bytes of memory
    per parameter, for any number of checkpoints.

    Raises:
        UserError: a checkpoint was replaced or deleted since it was chosen, or the memory does not suffice.
    """
    check_memory(shape_of(_manifest(chosen[0])), _BYTES_OF_SUM)
    sums: dict[str, npt.NDArray[np.float64]] = {}
    opened = []
    for generation in chosen:
        one = open_verified(generation, kind)
        for name in list(one.weights):
            weight = one.weights.pop(name).numpy()
            if name in sums:
                np.add(sums[name], weight, out=sums[name])  # converts a block at a time, without a copy in fp64
            else:
                sums[name] = weight.astype(np.float64)
        opened.append(one)
    weights = {name: _mean(sums.pop(name), len(chosen)) for name in list(sums)}
    steps = tuple(_manifest(one).step for one in opened)
    what = "mean of checkpoints" if kind == "raw" else "mean of the averaged weights of checkpoints"
    title = f"{opened[0].path.parent.name}, {what} at steps {', '.join(f'{step:,}' for step in steps)}"
    return dataclasses.replace(opened[0], title=title, weights=weights, averaged_steps=steps)


def _mean(total: npt.NDArray[np.float64], count: int) -> torch.Tensor:
    return torch.from_numpy(np.divide(total, count, out=total).astype(np.float32))


def _newest(checkpoints: RunCheckpoints, count: int, kind: Weights, warn: Callable[[str], None]) -> list[Generation]:
    if count < 2:
        raise UserError(f"--average {count}: an average needs at least 2 checkpoints")
    found: dict[int, Generation] = {}
    for generation in checkpoints.found:
        if len(found) == count:
            break
        if not generation.is_primary or generation.step in found:
            continue
        verdict = _verify(generation, kind)
        if verdict.problem is None:
            found[verdict.generation.step] = verdict.generation
        else:
            warn(f"{generation.path} is skipped: {verdict.problem}")
    if len(found) < count:
        steps = f" (steps {', '.join(f'{step:,}' for step in found)})" if found else ""
        fix = f": give --average {len(found)}" if len(found) > 1 else ""
        what = counted(len(found), "usable full checkpoint") + (" with averaged weights" if kind == "ema" else "")
        raise UserError(f"--average {count}: {checkpoints.directory} has {what}{steps}{fix}")
    return list(found.values())


def _named(run: str | None, which: str, kind: Weights) -> list[Generation]:
    tags = [tag.strip() for tag in which.split(",")]
    if len(tags) < 2 or not all(tags):
        raise UserError(f"--average {which}: give a number of checkpoints, or two or more tags separated by commas")
    found: dict[int, Generation] = {}
    for tag in tags:
        verdict = _verify(find_checkpoint(run, tag), kind)
        generation = verdict.generation
        if verdict.problem is not None:
            listing = f"`./launch.sh list {shlex.quote(str(generation.path.parent))}`"
            raise UserError(
                f"--average: {generation.path} cannot be used ({verdict.problem}): leave it out, see {listing}"
            )
        if (other := found.get(generation.step)) is not None:
            raise UserError(f"--average: {other.tag} and {generation.tag} are the same step: leave one out")
        found[generation.step] = generation
    return list(found.values())


def _verify(generation: Generation, kind: Weights) -> Verdict:
    """Return the checkpoint as it was when every byte of it was read, and why it cannot be used, if it cannot.

    A run may have replaced it (``best_model``), so its step may be another.
    """
    with hashing([generation]) as hashes:
        verdict = examine(generation.path, [lambda found: _lacks(found, kind), hashes.problem_of])
    return Verdict(generation, "it was deleted meanwhile") if verdict is None else verdict


def _lacks(generation: Generation, kind: Weights) -> str | None:
    has_kind = kind == "raw" or _manifest(generation).has_ema
    return None if has_kind else "it has no moving average of the weights"


def _manifest(found: Generation | OpenedModel) -> Manifest:
    assert found.manifest is not None
    return found.manifest
