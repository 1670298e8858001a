"""A model from what a person points at outside of runs, to compute with or to begin from."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ds_gpt2.errors import UserError
from ds_gpt2.model import GPT2, PADDED_VOCABULARY, ModelShape
from ds_gpt2.pretrained import file, huggingface
from ds_gpt2.pretrained.huggingface import Pretrained


def is_pretrained(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face directory or one of our files."""
    return huggingface.is_directory_of(path) or (path.suffix == file.SUFFIX and path.is_file())


def read(path: Path) -> Pretrained:
    """
    Raises:
        UserError: there is no model that ours can be, or its files are damaged.
    """
    if path.is_file():
        return file.read(path)
    if huggingface.is_directory_of(path):
        return huggingface.read(path)
    raise UserError(f"no model in {path}: give a Hugging Face directory of GPT-2 or a file of `export --format fp32`")


def as_model(shape: ModelShape, weights: dict[str, torch.Tensor]) -> GPT2:
    """The model that has these very tensors, in eval mode; its vocabulary is padded where they are not."""
    with torch.device("meta"):  # its own initial values would cost time and memory
        model = GPT2(shape)
    missing = PADDED_VOCABULARY - len(weights["wte.weight"])
    padded = F.pad(weights["wte.weight"], (0, 0, 0, missing)) if missing else weights["wte.weight"]
    model.load_state_dict({**weights, "wte.weight": padded}, assign=True)
    return model.eval()


def weights_for(shape: ModelShape, path: Path) -> dict[str, torch.Tensor]:
    """The weights, fp32, that a new run of ``shape`` begins with; of a longer context the first positions.

    Raises:
        UserError: there is no such model, or it is of another shape.
    """
    found = read(path)
    for name in ("layers", "heads", "width"):
        theirs, ours = getattr(found.shape, name), getattr(shape, name)
        if theirs != ours:
            raise UserError(f"model.init_from {path} has {name} {theirs}, not {ours}: set model.{name}={theirs}")
    if found.shape.sequence_length < shape.sequence_length:
        raise UserError(
            f"model.init_from {path} knows {found.shape.sequence_length} positions, batch.sequence_length is"
            f" {shape.sequence_length}: set it to {found.shape.sequence_length} at most"
        )
    return {**found.weights, "wpe.weight": found.weights["wpe.weight"][: shape.sequence_length]}
