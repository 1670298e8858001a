"""One file for plain PyTorch: ``torch.load(file, weights_only=True)["model"]`` are the fp32 weights by name."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ds_gpt2.errors import UserError
from ds_gpt2.model import PADDED_VOCABULARY, VOCABULARY, ModelShape
from ds_gpt2.pretrained.huggingface import Pretrained, check_shapes

SUFFIX = ".pt"


def write(weights: dict[str, torch.Tensor], shape: ModelShape, about: dict[str, Any], file: Path) -> None:
    """
    Args:
        weights: as the model has them, the vocabulary padded.
        about: where they come from; plain values.
    """
    torch.save({"model": weights, "shape": asdict(shape), "about": about}, file)


def read(file: Path) -> Pretrained:
    """What ``write`` wrote; nothing that a forged file may hold is run.

    Raises:
        UserError: it cannot be read, or is another kind of file.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        shape, weights = ModelShape(**content["shape"]), dict(content["model"])
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is not a file that `export --format fp32` has written: {reason}") from None
    check_shapes(file, shape, PADDED_VOCABULARY, weights)
    weights["wte.weight"] = weights["wte.weight"][:VOCABULARY]
    return Pretrained(shape, weights)
