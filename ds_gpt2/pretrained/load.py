"""Load a model outside of runs, given by name: for evaluation, generation, or to initialize a new run.

A name is a path (a Hugging Face directory, or a file of ``export --format fp32``) or a model on the hub. The functions
take names as returned by ``model_names.resolve``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.model_names import hub_name
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import PADDED_VOCABULARY, VOCABULARY, ModelShape
from ds_gpt2.pretrained import gpt2_config, hub, huggingface, torch_file
from ds_gpt2.pretrained.huggingface import Pretrained

log = logging.getLogger(__name__)


def is_pretrained(path: Path) -> bool:
    """Return whether ``path`` is a file or a Hugging Face directory, and therefore not a run.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.is_file() or huggingface.is_directory_of(path)
    except OSError as error:
        raise UserError(f"{str(path)[:300]} cannot be read: {error.strerror}") from None


def locate(name: str) -> Path:
    """Return the path of the model ``name``; a model on the hub is downloaded if it is not in the cache.

    Raises:
        UserError: it cannot be downloaded, or is not a GPT-2.
    """
    on_hub = hub_name(name)
    return Path(name) if on_hub is None else hub.fetch(on_hub, _report)


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def shape_at(path: Path) -> ModelShape:
    """Return the shape of the model in ``path``, after checking its config and headers without reading weights.

    Raises:
        UserError: there is no supported model, or its files are damaged.
    """
    return torch_file.check(path) if _is_export(path) else huggingface.check(path).shape


def read(path: Path) -> Pretrained:
    """Return the model in ``path``.

    Raises:
        UserError: there is no supported model, or its files are damaged.
    """
    return torch_file.read(path) if _is_export(path) else huggingface.read(path)


def _is_export(path: Path) -> bool:
    """Return whether ``path`` is a file of ``export --format fp32``; otherwise it is a Hugging Face directory.

    Raises:
        UserError: it is neither.
    """
    if not is_pretrained(path):
        problem = f"no model in {path}" if path.exists() else f"{path} does not exist"
        raise UserError(
            f"{problem}: give a Hugging Face directory of GPT-2, a file of `export --format fp32`, or a name on the hub"
            " (gpt2, OWNER/NAME)"
        )
    if not path.is_file():
        return False
    if path.name == gpt2_config.CONFIG or path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{path} is one file of a model: give its directory, {path.parent}")
    return True


def padding_note(found: Pretrained) -> str | None:
    """Return a message for the user about removed padding rows of the embedding, or None."""
    if not found.padding:
        return None
    return (
        f"vocabulary of {VOCABULARY + found.padding:,}: the {found.padding:,} rows beyond GPT-2's {VOCABULARY:,} tokens"
        " are padding and are removed; losses are computed without them"
    )


def as_model(shape: ModelShape, weights: dict[str, torch.Tensor]) -> GPT2:
    """Return a model in eval mode that uses these tensors without a copy; the vocabulary is padded if necessary.

    Args:
        weights: by our names.
    """
    with torch.device("meta"):  # saves the time and memory of initialization
        model = GPT2(shape)
    missing = PADDED_VOCABULARY - len(weights["wte.weight"])
    padded = F.pad(weights["wte.weight"], (0, 0, 0, missing)) if missing else weights["wte.weight"]
    model.load_state_dict({**weights, "wte.weight": padded}, assign=True)
    return model.eval()


def check(shape: ModelShape, name: str) -> None:
    """Check that a new run of ``shape`` can be initialized from the model ``name``; read and download no weights.

    For a model on the hub, only ``config.json`` is checked unless its weights are in the cache.

    Raises:
        UserError: there is no such model, it has another shape, or its files are damaged.
    """
    on_hub = hub_name(name)
    if on_hub is None:
        found = shape_at(Path(name))
    elif (directory := hub.cached(on_hub)) is not None:
        found = shape_at(directory)
    else:
        found = gpt2_config.read_config(hub.config_file(on_hub)).shape
    _check_shape(name, found, shape)


def prepare(shape: ModelShape, name: str) -> Path:
    """Download the model ``name`` if necessary, check everything except the values of its weights; return its path.

    Raises:
        UserError: as ``check``, or it cannot be downloaded.
    """
    check(shape, name)
    path = locate(name)
    _check_shape(name, shape_at(path), shape)
    return path


def weights_for(shape: ModelShape, name: str) -> dict[str, torch.Tensor]:
    """Return the initial weights of a new run of ``shape`` from the model ``name``, fp32, by our names.

    If the model has a longer context, its first positions are used.

    Raises:
        UserError: there is no such model, it has another shape, or its files are damaged.
    """
    found = read(locate(name))
    _check_shape(name, found.shape, shape)
    if (note := padding_note(found)) is not None:
        log.info(f"{name}: {note}")
    return {**found.weights, "wpe.weight": found.weights["wpe.weight"][: shape.sequence_length]}


def _check_shape(name: str, theirs: ModelShape, ours: ModelShape) -> None:
    fields = ("layers", "heads", "width")
    if any(getattr(theirs, field) != getattr(ours, field) for field in fields):
        has, needed = (", ".join(f"{field} {getattr(shape, field)}" for field in fields) for shape in (theirs, ours))
        settings = " ".join(f"model.{field}={getattr(theirs, field)}" for field in fields)
        raise UserError(f"model.init_from {name} has {has}; this run has {needed}: set {settings}")
    if theirs.sequence_length < ours.sequence_length:
        raise UserError(
            f"model.init_from {name} has {theirs.sequence_length} positions, but batch.sequence_length is"
            f" {ours.sequence_length}: set it to at most {theirs.sequence_length}"
        )
