"""A model from a name that a person gives, outside of runs: to compute with, or for a new run to begin from.

A name is a path (a Hugging Face directory, or a file that ``export --format fp32`` has written) or a model on the hub.
The functions here take names that ``model_names.resolve`` has told apart.
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
    """Return whether ``path`` is a file or a Hugging Face directory, so that it can be no run.

    Raises:
        UserError: it cannot be looked at.
    """
    try:
        return path.is_file() or huggingface.is_directory_of(path)
    except OSError as error:
        raise UserError(f"{str(path)[:300]} cannot be read: {error.strerror}") from None


def locate(name: str) -> Path:
    """Return the path of the model that ``name`` stands for, downloaded from the hub if it is not in the cache.

    Raises:
        UserError: it cannot be downloaded.
    """
    on_hub = hub_name(name)
    return Path(name) if on_hub is None else hub.fetch(on_hub, _tell)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def shape_at(path: Path) -> ModelShape:
    """Return the shape of the model in ``path``, from its config and headers.

    Raises:
        UserError: there is no model that ours can be, or its files are damaged.
    """
    return torch_file.check(path) if _is_export(path) else huggingface.check(path).shape


def read(path: Path) -> Pretrained:
    """Return the model in ``path``.

    Raises:
        UserError: there is no model that ours can be, or its files are damaged.
    """
    return torch_file.read(path) if _is_export(path) else huggingface.read(path)


def _is_export(path: Path) -> bool:
    """Return whether ``path`` is to be read as one of our files; otherwise it is a Hugging Face directory.

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
    """Return what a person must know of the rows of the embedding that were left out, or None."""
    if not found.padding:
        return None
    return (
        f"vocabulary of {VOCABULARY + found.padding:,}: the {found.padding:,} rows beyond GPT-2's {VOCABULARY:,} tokens"
        " are padding and left out; losses are over the tokens only"
    )


def as_model(shape: ModelShape, weights: dict[str, torch.Tensor]) -> GPT2:
    """Return the model that has these very tensors, in eval mode; the vocabulary is padded if it is not yet."""
    with torch.device("meta"):  # its own initial values would cost time and memory
        model = GPT2(shape)
    missing = PADDED_VOCABULARY - len(weights["wte.weight"])
    padded = F.pad(weights["wte.weight"], (0, 0, 0, missing)) if missing else weights["wte.weight"]
    model.load_state_dict({**weights, "wte.weight": padded}, assign=True)
    return model.eval()


def check(shape: ModelShape, name: str) -> None:
    """Check that a new run of ``shape`` can begin with the model ``name``; no weights are read or downloaded.

    Of a model on the hub only ``config.json`` is looked at until its weights are in the cache.

    Raises:
        UserError: there is no such model, it is of another shape, or its files are damaged.
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
    """Have the model ``name`` on this machine and check it, all but the values of its weights; return its path.

    Raises:
        UserError: as ``check`` does, or it cannot be downloaded.
    """
    check(shape, name)
    path = locate(name)
    _check_shape(name, shape_at(path), shape)
    return path


def weights_for(shape: ModelShape, name: str) -> dict[str, torch.Tensor]:
    """Return the weights, fp32, that a new run of ``shape`` begins with; of a longer context the first positions.

    Raises:
        UserError: there is no such model, it is of another shape, or its files are damaged.
    """
    found = read(locate(name))
    _check_shape(name, found.shape, shape)
    if (note := padding_note(found)) is not None:
        log.info(f"{name}: {note}")
    return {**found.weights, "wpe.weight": found.weights["wpe.weight"][: shape.sequence_length]}


def _check_shape(name: str, theirs: ModelShape, ours: ModelShape) -> None:
    fields = ("layers", "heads", "width")
    if any(getattr(theirs, field) != getattr(ours, field) for field in fields):
        has, wanted = (", ".join(f"{field} {getattr(shape, field)}" for field in fields) for shape in (theirs, ours))
        settings = " ".join(f"model.{field}={getattr(theirs, field)}" for field in fields)
        raise UserError(f"model.init_from {name} has {has}; this run has {wanted}: set {settings}")
    if theirs.sequence_length < ours.sequence_length:
        raise UserError(
            f"model.init_from {name} knows {theirs.sequence_length} positions, batch.sequence_length is"
            f" {ours.sequence_length}: set it to {theirs.sequence_length} at most"
        )
