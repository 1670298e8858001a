"""Open a model by name: of a run, of one of its checkpoints, or from outside of runs."""

from __future__ import annotations

import pickle
import shlex
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ds_gpt2.checkpoint.catalog import Generation, open_generation
from ds_gpt2.checkpoint.commit import has_same_files
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest, Weights
from ds_gpt2.checkpoint.verify import examine, hashing, identity
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.formatting import size
from ds_gpt2.config.model_names import hub_name, resolve
from ds_gpt2.model.shape import PADDED_VOCABULARY, ModelShape
from ds_gpt2.pretrained import load
from ds_gpt2.pretrained.huggingface import check_shapes
from ds_gpt2.tools.resources.run_checkpoints import find_checkpoint, find_run_checkpoints

_BYTES_PER_WEIGHT = 5  # one fp32 copy, and the part of one rank's file that is read at a time
_TRIES = 3  # a run may replace best_model while it is read: files of two checkpoints must not be mixed
_PROCESS_BYTES = 300_000_000  # memory of the process besides the weights


@dataclass(frozen=True)
class OpenedModel:
    """The weights of a model in fp32, under this project's names; the vocabulary may be padded."""

    title: str  # for messages
    shape: ModelShape
    weights: dict[str, torch.Tensor]
    path: Path
    manifest: Manifest | None  # of the checkpoint; None for a model from outside of runs
    note: str | None = None  # what users must know about the model
    kind: Weights = "raw"
    averaged_steps: tuple[int, ...] = ()  # of the checkpoints whose mean the weights are; empty: of one checkpoint


def open_model(name: str | None, tag: str | None, kind: Weights = "raw") -> OpenedModel:
    """Return a model with its weights; every byte of a checkpoint is verified first.

    Args:
        name: a run, a directory of checkpoints, a checkpoint, a Hugging Face directory, an exported file, or a name on
            the hub; None: the newest run.
        tag: which checkpoint, see ``catalog.candidates``; None: the newest.
        kind: which weights of the checkpoint.

    Raises:
        UserError: there is no such model, it is damaged, it has no such weights, or it does not fit into memory.
    """
    outside = find_outside(name, tag)
    if outside is not None:
        check_kind(str(name), None, kind)
        check_memory(load.shape_at(outside))
        found = load.read(outside)
        return OpenedModel(str(name), found.shape, found.weights, outside, None, load.padding_note(found))
    path = find_checkpoint(name, tag).path
    for _ in range(_TRIES):
        before = identity(path)
        try:
            opened = _open_checkpoint(path, kind)
        except UserError:
            if identity(path) == before:
                raise
            continue
        if identity(path) == before:
            return opened
    raise UserError(f"{path} was replaced repeatedly while it was read: choose another with --tag")


def open_verified(generation: Generation, kind: Weights) -> OpenedModel:
    """Return the weights of a checkpoint whose files were verified; they are not hashed again.

    Raises:
        UserError: it has since been replaced or deleted, has no such weights, or does not fit into memory.
    """
    path, manifest = generation.path, generation.manifest
    assert manifest is not None
    try:
        opened = _read_weights(path, manifest, kind)
    except UserError:
        if _is_still(path, manifest):
            raise
        opened = None
    if opened is None or not _is_still(path, manifest):
        raise UserError(f"{path} was replaced or deleted while it was read: repeat the command")
    return opened


def _is_still(path: Path, manifest: Manifest) -> bool:
    found = open_generation(path).manifest
    return found is not None and has_same_files(found, manifest)


def damaged(path: Path, problem: str | None) -> UserError:
    """Return the error that a checkpoint is damaged."""
    listing = f"`./launch.sh list {shlex.quote(str(path.parent))}`"
    return UserError(f"{path} is damaged ({problem}): choose another with --tag, see {listing}")


def check_kind(name: str, manifest: Manifest | None, kind: Weights) -> None:
    """Check that a model has weights of this kind.

    Args:
        manifest: of the checkpoint; None for a model from outside of runs.

    Raises:
        UserError: it does not.
    """
    if kind == "ema" and manifest is None:
        raise UserError(
            f"--weights ema: {name} is not a checkpoint of a run: it has one kind of weights, omit --weights"
        )
    if kind == "ema" and manifest is not None and not manifest.has_ema:
        raise UserError(f"--weights ema: {name} has no moving average of the weights: its run had no ema.decay")


def find_outside(name: str | None, tag: str | None) -> Path | None:
    """Return the path of a model from outside of runs, downloaded if it is on the hub; None for a model of a run.

    A run takes precedence over a model on the hub with the same name.

    Raises:
        UserError: it cannot be downloaded, or a tag is given, which such a model does not have.
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


def shape_of(manifest: Manifest) -> ModelShape:
    """Return the shape of the model in a checkpoint.

    Raises:
        UserError: the manifest does not have it.
    """
    try:
        layers, heads, width = (int(manifest.identity[f"model.{name}"]) for name in ("layers", "heads", "width"))
        return ModelShape(layers, heads, width, int(manifest.identity["batch.sequence_length"]))
    except (KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint's manifest does not have the model's shape: {error!r}") from None


def check_memory(shape: ModelShape, additional: int = 0) -> None:
    """Check that one fp32 copy of the weights fits into the available memory.

    Args:
        additional: bytes per weight that are needed as well.

    Raises:
        UserError: it does not.
    """
    needed = (_BYTES_PER_WEIGHT + additional) * shape.unpadded_parameters + _PROCESS_BYTES
    free = psutil.virtual_memory().available
    if free < needed:
        raise UserError(f"the weights need {size(needed)} of memory, {size(free)} are free: stop other processes")


def _open_checkpoint(path: Path, kind: Weights) -> OpenedModel:
    return _read_weights(path, _verified(path), kind)


def _read_weights(path: Path, manifest: Manifest, kind: Weights) -> OpenedModel:
    check_kind(str(path), manifest, kind)
    shape = shape_of(manifest)
    check_memory(shape)
    try:
        from ds_gpt2.checkpoint.weights import fp32_weights  # imports DeepSpeed

        weights = fp32_weights(path, kind)
    except (DamagedError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {one_line_reason(error, 300)}") from None
    check_shapes(path, shape, PADDED_VOCABULARY, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    title = f"{path.parent.name}, step {manifest.step:,} ({path.name})" + (
        ", averaged weights" if kind == "ema" else ""
    )
    return OpenedModel(title, shape, weights, path, manifest, kind=kind)


def _refuse_tag(name: str, tag: str | None) -> None:
    if tag is not None:
        raise UserError(f"--tag {tag}: {name} is one model and has no checkpoints")


def _is_run(name: str) -> bool:
    try:
        find_run_checkpoints(name)
    except UserError:
        return False
    return True


def _verified(path: Path) -> Manifest:
    generation = open_generation(path)
    with hashing([generation]) as hashes:
        verdict = examine(path, [hashes.problem_of])
    if verdict is None:
        raise UserError(f"{path} was deleted while it was read: try again, or choose another with --tag")
    if verdict.problem is not None or verdict.generation.manifest is None:
        raise damaged(path, verdict.problem)
    return verdict.generation.manifest
