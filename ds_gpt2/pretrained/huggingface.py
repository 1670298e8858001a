"""Hugging Face's layout of GPT-2: names, shapes and config, as ``transformers``' modeling_gpt2.py has them.

Its projections are ``Conv1D``, which keep matrices as (in, out) where ``nn.Linear`` has (out, in). The head is the
embedding and is not written a second time. The vocabulary is cut to the 50,257 tokens there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ds_gpt2.errors import UserError
from ds_gpt2.model import VOCABULARY, ModelShape
from ds_gpt2.tokenizer import END_OF_TEXT

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_PREFIX = "transformer."  # of GPT2LMHeadModel; OpenAI's own files on the hub have none
_TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.weight")
_NO_PARAMETERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # old files hold the causal mask, too
_HEAD = "lm_head.weight"

DTypeName = Literal["float32", "bfloat16"]


class _Config(BaseModel):
    """What of ``config.json`` the model must have."""

    model_config = ConfigDict(extra="ignore")

    model_type: Literal["gpt2"]
    vocab_size: PositiveInt
    n_positions: PositiveInt
    n_embd: PositiveInt
    n_layer: PositiveInt
    n_head: PositiveInt
    n_inner: PositiveInt | None = None
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    tie_word_embeddings: Literal[True] = True


@dataclass(frozen=True)
class Pretrained:
    """A model's weights under our names, fp32, the vocabulary not padded."""

    shape: ModelShape
    weights: dict[str, torch.Tensor]


def config_of(shape: ModelShape, dropout: float, dtype: DTypeName) -> dict[str, Any]:
    """The content of ``config.json``; transformers before 4.56 calls the dtype ``torch_dtype``."""
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
    """Write ``model.safetensors``; ``weights`` is emptied on the way, so that no second copy is needed."""
    converted: dict[str, torch.Tensor] = {}
    for name in list(weights):
        converted[_PREFIX + name] = _to_theirs(name, weights.pop(name)).to(dtype).contiguous()
    save_file(converted, file, metadata={"format": "pt"})
    file.chmod(0o644)  # as the other files; the library makes it its owner's alone


def is_directory_of(path: Path) -> bool:
    """Whether a Hugging Face model seems to lie in ``path``."""
    return (path / CONFIG).is_file()


def read(directory: Path) -> Pretrained:
    """A GPT-2 from its directory; only safetensors, as other formats can run what they like.

    Raises:
        UserError: it is no GPT-2, or not one that ours can be; its files are damaged, incomplete or of another kind.
    """
    config = _read_config(directory / CONFIG)
    shape = ModelShape(config.n_layer, config.n_head, config.n_embd, config.n_positions)
    file = directory / WEIGHTS
    if not file.is_file():
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".safetensors", ".pt"))
        raise UserError(
            f"{directory} has no {WEIGHTS} (there are {', '.join(others) or 'no weights'}): save it again as one"
            " safetensors file, with transformers' save_pretrained(max_shard_size='100GB')"
        )
    try:
        weights = dict(_read_weights(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    check_shapes(file, shape, config.vocab_size, weights)
    return Pretrained(shape, weights)


def _read_config(file: Path) -> _Config:
    try:
        config = _Config.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is of another model: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if config.vocab_size != VOCABULARY:
        raise UserError(f"{file}: a vocabulary of {config.vocab_size:,} tokens; GPT-2's has {VOCABULARY:,}")
    if config.n_inner not in (None, 4 * config.n_embd):
        raise UserError(f"{file}: n_inner {config.n_inner}; this model's is always 4 x n_embd = {4 * config.n_embd}")
    if config.layer_norm_epsilon != 1e-5 or config.n_embd % config.n_head:
        raise UserError(f"{file}: layer_norm_epsilon {config.layer_norm_epsilon}, n_head {config.n_head}: not GPT-2's")
    return config


def _read_weights(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for theirs in opened.keys():  # noqa: SIM118  (it is no dictionary)
            name = theirs.removeprefix(_PREFIX)
            if name != _HEAD and not _NO_PARAMETERS.fullmatch(name):
                yield name, _to_theirs(name, opened.get_tensor(theirs)).float().contiguous()


def _to_theirs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """From our layout to theirs, or back."""
    tensor = tensor[:VOCABULARY] if name == "wte.weight" else tensor
    return tensor.t() if _TRANSPOSED.fullmatch(name) and tensor.dim() == 2 else tensor


def shapes_of(shape: ModelShape, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model under our names."""
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
    return {
        "wte.weight": (vocabulary, width),
        "wpe.weight": (shape.sequence_length, width),
        **{f"h.{number}.{name}": size for number in range(shape.layers) for name, size in layer.items()},
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }


def check_shapes(file: Path, shape: ModelShape, vocabulary: int, weights: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        UserError: ``weights``, under our names, are not those of a model of this shape.
    """
    expected = shapes_of(shape, vocabulary)
    if strange := sorted(weights.keys() ^ expected.keys()):
        what = "no" if strange[0] in expected else "an unknown"
        raise UserError(f"{file} has {what} {strange[0]}: it is not the model that it is said to be")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{file}: {name} is {tuple(tensor.shape)}; of the model that it is said to be, {expected[name]}"
            )
