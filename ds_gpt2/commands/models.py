"""A model from what a person points at: a run, one of its checkpoints, or what was exported."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest
from ds_gpt2.checkpoint.naming import LATEST, MANIFEST
from ds_gpt2.checkpoint.verify import examine, hashing, identity
from ds_gpt2.commands.checkpoints import find_run_directories
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import size
from ds_gpt2.config.model_names import hub_name, resolve
from ds_gpt2.model.shape import PADDED_VOCABULARY, ModelShape
from ds_gpt2.pretrained import load
from ds_gpt2.pretrained.huggingface import check_shapes, shapes_of

_WEIGHT_BYTES = 5  # one copy, and what is looked at of one rank's file
_TRIES = 3  # a run may put a new best in the place of the one that is read: its files must not be mixed
_SPARE_BYTES = 300_000_000  # what a process holds beside the weights


@dataclass(frozen=True)
class Opened:
    """A model's weights, fp32, under our names; the vocabulary may be padded."""

    title: str  # for people
    shape: ModelShape
    weights: dict[str, torch.Tensor]
    path: Path  # where it lies
    manifest: Manifest | None  # of the checkpoint; None if it comes from outside of a run
    note: str | None = None  # what a person must know of it


def open_model(name: str | None, tag: str | None) -> Opened:
    """The model that ``name`` and ``tag`` mean; of a checkpoint every byte is verified first.

    Args:
        name: a run, a directory of checkpoints, a checkpoint, a Hugging Face directory, an exported file, or a name on
            the hub; None: the newest run.
        tag: which checkpoint, see ``catalog.candidates``; None: the newest.

    Raises:
        UserError: there is none, it is damaged, or too large for the memory.
    """
    outside = find_outside(name, tag)
    if outside is not None:
        check_memory(load.shape_at(outside))
        found = load.read(outside)
        return Opened(str(name), found.shape, found.weights, outside, None, load.padding_note(found))
    path = find_checkpoint(name, tag).path
    for _ in range(_TRIES):
        before = identity(path)
        try:
            opened = _open_checkpoint(path)
        except UserError:
            if identity(path) == before:
                raise
            continue
        if identity(path) == before:
            return opened
    raise UserError(f"{path} was replaced again and again while it was read: choose another with --tag")


def _open_checkpoint(path: Path) -> Opened:
    manifest = _verified(path)
    shape = shape_of(manifest)
    check_memory(shape)
    try:
        from ds_gpt2.checkpoint.weights import fp32_weights  # imports DeepSpeed

        weights = fp32_weights(path)
    except (DamagedError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from None
    check_shapes(path, shape, PADDED_VOCABULARY, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    return Opened(f"{path.parent.name}, step {manifest.step:,} ({path.name})", shape, weights, path, manifest)


def find_outside(name: str | None, tag: str | None) -> Path | None:
    """Return the path of a model that comes from outside of runs, downloaded if it is on the hub; None for a run's.

    A run of the same name comes before the hub.

    Raises:
        UserError: it cannot be downloaded, or ``tag`` is given, which such a model does not have.
    """
    if name is None:
        return None
    path = Path(name)
    if not load.is_pretrained(path):
        resolved = resolve(name, Path.cwd())
        if hub_name(resolved) is None or _is_run(name):
            return None
        _refuse_tag(name, tag)
        return load.locate(resolved)
    _refuse_tag(name, tag)
    return path


def _refuse_tag(name: str, tag: str | None) -> None:
    if tag is not None:
        raise UserError(f"--tag {tag}: {name} is one model and has no checkpoints")


def _is_run(name: str) -> bool:
    try:
        find_run_directories(name)
    except UserError:
        return False
    return True


def find_checkpoint(name: str | None, tag: str | None) -> Generation:
    """
    Raises:
        UserError: there is no such checkpoint.
    """
    if name is not None and (Path(name) / MANIFEST).is_file():
        if tag is not None:
            raise UserError(f"--tag {tag}: {name} is one checkpoint already")
        return open_generation(Path(name))
    place = find_run_directories(name)
    history = [found for found in place.found if not found.is_superseded]
    if not history:
        raise UserError(f"no checkpoints in {place.directory} yet")
    return history[0] if tag in (None, LATEST) else candidates(place.directory, str(tag))[0]


def shape_of(manifest: Manifest) -> ModelShape:
    """
    Raises:
        UserError: the manifest does not tell.
    """
    try:
        layers, heads, width = (int(manifest.identity[f"model.{name}"]) for name in ("layers", "heads", "width"))
        return ModelShape(layers, heads, width, int(manifest.identity["batch.sequence_length"]))
    except (KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint's manifest does not tell the model's shape: {error!r}") from None


def check_memory(shape: ModelShape) -> None:
    """
    Raises:
        UserError: there is too little for one fp32 copy of the weights.
    """
    needed = _WEIGHT_BYTES * count_parameters(shape) + _SPARE_BYTES
    free = psutil.virtual_memory().available
    if free < needed:
        raise UserError(f"the weights need {size(needed)} of memory, {size(free)} are free: end something else")


def count_parameters(shape: ModelShape) -> int:
    """Without the padding of the vocabulary."""
    return sum(int(torch.Size(each).numel()) for each in shapes_of(shape).values())


def _verified(path: Path) -> Manifest:
    generation = open_generation(path)
    with hashing([generation]) as hashes:
        verdict = examine(path, [hashes.problem_of])
    if verdict is None:
        raise UserError(f"{path} was deleted while it was looked at: try again, or choose with --tag")
    if verdict.problem is not None or verdict.generation.manifest is None:
        raise UserError(f"{path} is damaged ({verdict.problem}): choose another with --tag, see `list`")
    return verdict.generation.manifest
