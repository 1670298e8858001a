"""Single files for plain PyTorch: ``torch.load(file, weights_only=True)["model"]`` has the fp32 weights by name."""

from __future__ import annotations

import pickle
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only
from ds_gpt2.model.shape import PADDED_VOCABULARY, VOCABULARY, ModelShape
from ds_gpt2.pretrained.huggingface import Pretrained, as_weight, check_shapes

SUFFIX = ".pt"

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def write(weights: dict[str, torch.Tensor], shape: ModelShape, about: dict[str, Any], file: Path) -> None:
    """Write a model to ``file``.

    Args:
        weights: by our names, with padded vocabulary.
        about: their origin; plain values.
    """
    torch.save({"model": weights, "shape": asdict(shape), "about": about}, file)


def check(file: Path) -> ModelShape:
    """Return the shape of the model in a file of ``write``, without reading the values of its tensors.

    Raises:
        UserError: as ``read``, except for values that are not finite.
    """
    return _load(file)[0]


def read(file: Path) -> Pretrained:
    """Return the model in a file of ``write``. Code in a forged file is not run.

    Raises:
        UserError: the file cannot be read or has another format, or its weights are unusable.
    """
    shape, weights = _load(file)
    for name in weights:
        weights[name] = as_weight(file, name, weights[name]).clone()  # the mapped file may change or be removed
    weights["wte.weight"] = weights["wte.weight"][:VOCABULARY]
    return Pretrained(shape, weights)


def _load(file: Path) -> tuple[ModelShape, dict[str, torch.Tensor]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise _refused(file, error.strerror or error) from None
    except Exception as error:  # a forged file can raise any type; PyTorch's messages are about its internals
        raise _refused(file, _describe(file, error)) from None
    shape, weights = _shape(file, content), content.get("model")
    if not isinstance(weights, dict):
        raise _refused(file, "it has no dictionary of weights")
    for name, tensor in weights.items():
        _check_tensor(file, name, tensor)
    check_shapes(file, shape, PADDED_VOCABULARY, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    return shape, dict(weights)


def _describe(file: Path, error: Exception) -> str:
    """Return the reason why torch.load cannot read a file."""
    with open(file, "rb", opener=regular_only) as opened:
        is_archive = opened.read(4) == b"PK\x03\x04"
    if not is_archive:
        return "it is damaged, or not a file of torch.save"
    if isinstance(error, pickle.UnpicklingError):
        return "it contains objects other than tensors and plain values, such as code, which are not loaded"
    return "it is damaged or truncated"


def _shape(file: Path, content: Any) -> ModelShape:
    shape = content.get("shape") if isinstance(content, dict) else None
    names = {field.name for field in fields(ModelShape)}
    if not isinstance(shape, dict) or shape.keys() != names:
        raise _refused(file, "it does not have the model's shape")
    if any(type(value) is not int for value in shape.values()):
        raise _refused(file, f"{str(shape)[:100]} is not a model's shape")
    try:
        return ModelShape(**shape)
    except ValueError as error:
        raise _refused(file, error) from None


def _check_tensor(file: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise _refused(file, f"{str(name)[:100]!r} is not a weight")
    if tensor.dtype not in _DTYPES:
        raise _refused(file, f"{name[:100]} is of dtype {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise _refused(file, f"{name[:100]} is not stored as a contiguous CPU tensor")


def _refused(file: Path, reason: object) -> UserError:
    text = "".join(each if each.isprintable() else " " for each in " ".join(str(reason).split()))[:200]
    return UserError(f"{file} is not a valid file of `export --format fp32`: {text or type(reason).__name__}")
