"""Read and write GPT-2 in Hugging Face's layout: names, shapes and config of transformers' modeling_gpt2.py.

Its projections are ``Conv1D`` with weights (in, out), where ``nn.Linear`` has (out, in). The output head is tied to the
embedding and not written. The vocabulary is cut to GPT-2's 50,257 tokens when reading and writing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.tokenizer import END_OF_TEXT
from ds_gpt2.model.shape import VOCABULARY, ModelShape
from ds_gpt2.pretrained import tensors
from ds_gpt2.pretrained.gpt2_config import CONFIG as CONFIG
from ds_gpt2.pretrained.gpt2_config import GPT2Config, read_config
from ds_gpt2.pretrained.tensors import WEIGHTS as WEIGHTS
from ds_gpt2.pretrained.tokenizer_files import check_tokenizer

_PREFIX = "transformer."  # of GPT2LMHeadModel; OpenAI's own files on the hub have none
_TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.weight")
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # old files contain the causal mask
HEAD = "lm_head.weight"

DTypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Pretrained:
    """The weights of a model by our names, fp32, without padding of the vocabulary."""

    shape: ModelShape
    weights: dict[str, torch.Tensor]
    padding: int = 0  # rows of the embedding beyond GPT-2's vocabulary, which were removed


def config_of(shape: ModelShape, dropout: float, dtype: DTypeName) -> dict[str, Any]:
    """Return the content of ``config.json``. The name ``torch_dtype`` is understood by all versions of transformers."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_positions": shape.sequence_length,
        "n_ctx": shape.sequence_length,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "torch_dtype": dtype,
    }


def write_weights(weights: dict[str, torch.Tensor], file: Path, dtype: torch.dtype) -> None:
    """Write ``model.safetensors``.

    Args:
        weights: by our names, with any padding; the dict is emptied meanwhile to save memory.
        dtype: of the file.
    """
    converted: dict[str, torch.Tensor] = {}
    for name in list(weights):
        converted[_PREFIX + name] = _to_theirs(name, weights.pop(name)).to(dtype).contiguous()
    save_file(converted, file, metadata={"format": "pt"})
    file.chmod(0o644)  # as the other files; the library creates it readable by its owner only


def is_directory_of(path: Path) -> bool:
    """Return whether ``path`` has the files of a Hugging Face model."""
    return (path / CONFIG).is_file() or tensors.has_weights(path)


def check(directory: Path) -> GPT2Config:
    """Check the config, tokenizer and tensor headers of a directory without reading tensors.

    Raises:
        UserError: it is not a GPT-2 that computes the same function as ours, or its files are incomplete or damaged.
    """
    config = read_config(directory / CONFIG)
    check_tokenizer(directory, config.vocabulary)
    _model_tensors(directory, config)
    return config


def read(directory: Path) -> Pretrained:
    """Return the GPT-2 in a directory.

    Raises:
        UserError: as ``check``, or the weights are not finite, or the output head differs from the embedding.
    """
    config = read_config(directory / CONFIG)
    check_tokenizer(directory, config.vocabulary)
    found = _model_tensors(directory, config)
    weights: dict[str, torch.Tensor] = {}
    for theirs, tensor in tensors.read({each.name: each.tensor for each in found.values()}):
        name = _our_name(theirs)
        weights[name] = as_weight(directory, name, _to_theirs(name, tensor))
    _check_tied(directory, weights)
    return Pretrained(config.shape, weights, config.vocabulary - VOCABULARY)


@dataclass(frozen=True)
class _Named:
    """A tensor and its name in the files."""

    name: str
    tensor: tensors.Stored


def _model_tensors(directory: Path, config: GPT2Config) -> dict[str, _Named]:
    """Return the tensors of the model, and of the output head if it is stored, by our names.

    Raises:
        UserError: a tensor is missing, unknown, duplicated, or of another shape or dtype.
    """
    found: dict[str, _Named] = {}
    for theirs, stored in tensors.headers(directory).items():
        name = _our_name(theirs)
        if _BUFFERS.fullmatch(name):
            continue
        if name in found:
            raise UserError(
                f"{directory} has both {found[name].name} and {theirs}: only one of them can belong to the model"
            )
        tensors.check_dtype(theirs, stored)
        found[name] = _Named(theirs, stored)
    sizes = {name: _our_size(name, each.tensor.shape) for name, each in found.items()}
    head = sizes.pop(HEAD, None)
    _check_stored_shapes(directory, config, found)
    check_shapes(directory, config.shape, config.vocabulary, sizes)
    if head is not None and head != sizes["wte.weight"]:
        raise UserError(
            f"{directory}: {HEAD} is {head}, but the embedding is {sizes['wte.weight']}; they must be equal"
        )
    return found


def _check_stored_shapes(directory: Path, config: GPT2Config, found: Mapping[str, _Named]) -> None:
    """Check the sizes of tensors that are stored transposed, so that the error message has the sizes of the file.

    Raises:
        UserError: a tensor has another size.
    """
    for name, size in _shapes(config.shape, config.vocabulary):
        if name not in found:
            return  # reported by check_shapes
        stored = found[name].tensor.shape
        if _TRANSPOSED.fullmatch(name) and stored != size[::-1]:
            hint = ": it is transposed" if stored == size else ""
            raise UserError(f"{directory}: {name} is stored as {stored}, but its config requires {size[::-1]}{hint}")


def _our_name(theirs: str) -> str:
    """Return our name of a tensor, given its name in a file."""
    return theirs.removeprefix(_PREFIX) if theirs != _PREFIX + HEAD else theirs


def _our_size(name: str, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size of a tensor in our layout, given its size in a file."""
    return size[::-1] if _TRANSPOSED.fullmatch(name) and len(size) == 2 else size


def as_weight(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in fp32, contiguous.

    Raises:
        UserError: it has an Inf or NaN, or a number beyond the range of fp32.
    """
    weight = tensor.float().contiguous()
    low, high = torch.aminmax(weight)  # needs less memory than isfinite; a NaN becomes minimum and maximum
    if not (low.isfinite() and high.isfinite()):
        raise UserError(f"{path}: {name} has values that are Inf or NaN in fp32: the weights are unusable")
    return weight


def _check_tied(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Remove the output head from ``weights`` if it is stored.

    Raises:
        UserError: it differs from the embedding.
    """
    head = weights.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise UserError(
            f"{path}: {HEAD} differs from the embedding wte.weight; only tied embeddings are supported"
            " (tie_word_embeddings)"
        )


def _to_theirs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor between our layout and Hugging Face's, in either direction."""
    tensor = tensor[:VOCABULARY] if name in ("wte.weight", HEAD) else tensor
    return tensor.t() if _TRANSPOSED.fullmatch(name) and tensor.dim() == 2 else tensor


def _shapes(shape: ModelShape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and size of every parameter of a model by our names."""
    width = shape.width
    layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (3 * width, width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    yield "wte.weight", (vocabulary, width)
    yield "wpe.weight", (shape.sequence_length, width)
    for number in range(shape.layers):
        for name, size in layer.items():
            yield f"h.{number}.{name}", size
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def check_shapes(path: Path, shape: ModelShape, vocabulary: int, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the sizes of tensors, by our names, against those of a model of this shape.

    Raises:
        UserError: a tensor is missing, unknown or of another size.
    """
    expected = set()
    for name, size in _shapes(shape, vocabulary):  # stops at the first missing one, even for a forged number of layers
        if name not in sizes:
            raise UserError(f"{path} has no {name}: the weights do not match the model's config")
        if sizes[name] != size:
            raise UserError(f"{path}: {name} is {sizes[name]}, but the model's config requires {size}")
        expected.add(name)
    if unknown := sorted(sizes.keys() - expected):
        shown = tensors.printable(unknown[0])
        raise UserError(f"{path} has an unknown tensor {shown}: the weights do not match the model's config")
