"""Read ``config.json`` of a Hugging Face GPT-2 and check that the model computes the same function as ours.

``_Config`` lists every field that changes the function in transformers' modeling_gpt2.py, with the default of
transformers. A value that our model does not implement is an error that names the field. Fields that only affect
training (dropout, initialization) or other heads (``summary_*``, ``n_ctx``) are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.formatting import uncapitalized
from ds_gpt2.data.tokenizer import END_OF_TEXT
from ds_gpt2.model.shape import LARGEST_SIZE, VOCABULARY, ModelShape

CONFIG = "config.json"

# Models of GPT-2's vocabulary pad it to a multiple of at most 1,024 rows; a larger one is another vocabulary.
LARGEST_VOCABULARY = 51_200

_LARGEST_BYTES = 10_000_000  # of config.json, which usually has a few kB
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Five implementations of one formula: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
_TIED_HEADS = ("GPT2LMHeadModel", "GPT2Model")


@dataclass(frozen=True)
class GPT2Config:
    """The content of ``config.json`` that determines the weights."""

    shape: ModelShape
    vocabulary: int  # rows of the embedding: 50,257 plus padding


def _one_of(*allowed: Any) -> BeforeValidator:
    """Return a validator that accepts only ``allowed``; 1 and True are different."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise ValueError(f"only {' or '.join(map(json.dumps, allowed))} is supported")
        return value

    return BeforeValidator(check)


def _empty(value: Any) -> Any:
    if value:
        raise ValueError("this is not supported")
    return value


def _end_of_text(value: Any) -> Any:
    tokens = value if isinstance(value, list) else [value]
    if value is not None and END_OF_TEXT not in tokens:
        raise ValueError(
            f"GPT-2's <|endoftext|> is {END_OF_TEXT}, so this model has another tokenizer; if its tokenizer is GPT-2's,"
            f" set the value to {END_OF_TEXT} in this file"
        )
    return value


def _real_token(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if any(each is not None and (type(each) is not int or each < 0) for each in values):
        raise ValueError("it is not a token id; remove it from this file")
    if any(type(each) is int and each >= VOCABULARY for each in values):
        raise ValueError(
            f"a token beyond GPT-2's {VOCABULARY:,} is in use, so its row is not padding; remove it from this file if"
            " the model does not need it"
        )
    return value


def _known_architectures(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"it must be a list, such as {json.dumps([_TIED_HEADS[0]])}")
    if value and not (isinstance(value, list) and any(each in _TIED_HEADS for each in value)):
        raise ValueError(f"only {_TIED_HEADS[0]} is supported")
    return value


_Size = Annotated[int, Field(gt=0, le=LARGEST_SIZE, strict=True)]
_False = Annotated[Any, _one_of(False)]
_True = Annotated[Any, _one_of(True)]
_Absent = Annotated[Any, BeforeValidator(_empty)]
_EndOfText = Annotated[Any, BeforeValidator(_end_of_text), BeforeValidator(_real_token)]
_Token = Annotated[Any, BeforeValidator(_real_token)]


class _Config(BaseModel):
    """The fields that change the function."""

    model_config = ConfigDict(extra="ignore")

    model_type: Annotated[Any, _one_of("gpt2")]
    architectures: Annotated[Any, BeforeValidator(_known_architectures)] = None
    auto_map: _Absent = None  # code in the repository
    quantization_config: _Absent = None
    pruned_heads: _Absent = None
    vocab_size: _Size = VOCABULARY
    n_positions: _Size = 1024
    n_embd: _Size = 768
    n_layer: _Size = 12
    n_head: _Size = 12
    n_inner: Annotated[int, Field(strict=True)] | None = None
    activation_function: Annotated[Any, _one_of(*_TANH_GELU)] = "gelu_new"
    layer_norm_epsilon: Annotated[Any, _one_of(1e-5)] = 1e-5
    scale_attn_weights: _True = True
    scale_attn_by_inverse_layer_idx: _False = False
    reorder_and_upcast_attn: Annotated[Any, _one_of(True, False)] = False  # only the order and precision of one product
    add_cross_attention: _False = False
    is_encoder_decoder: _False = False
    is_causal: _True = True
    tie_word_embeddings: _True = True
    bos_token_id: _EndOfText = None
    eos_token_id: _EndOfText = None
    pad_token_id: _Token = None
    sep_token_id: _Token = None


def read_config(file: Path) -> GPT2Config:
    """Return the validated content of ``config.json``.

    Raises:
        UserError: it cannot be read, or its model computes another function than ours.
    """
    fields = _fields(file)
    try:
        config = _Config.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{file}: {_first_problem(error, fields)}") from None
    if not VOCABULARY <= config.vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"{file}: vocab_size is {config.vocab_size:,}; GPT-2's vocabulary has {VOCABULARY:,} tokens, and up to"
            f" {LARGEST_VOCABULARY:,} rows with padding"
        )
    if config.n_inner not in (None, 4 * config.n_embd):
        raise UserError(f"{file}: n_inner is {config.n_inner}; only 4 x n_embd = {4 * config.n_embd} is supported")
    if config.n_embd % config.n_head:
        raise UserError(f"{file}: n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
    return GPT2Config(ModelShape(config.n_layer, config.n_head, config.n_embd, config.n_positions), config.vocab_size)


def _fields(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_BYTES:
            raise UserError(
                f"{file} is larger than {_LARGEST_BYTES:,} bytes, so it is not the config of a GPT-2 model: download"
                " the model again, or give another one"
            )
        fields = safe_json.read(file)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or a very long number
        raise UserError(f"{file} cannot be read: {reason_of(error)}") from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{file} is not a JSON object, so it is not the config of a GPT-2 model: download the model again, or give"
            " another one"
        )
    return _with_own_names(file, fields)


def _with_own_names(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with transformers' general names replaced by GPT-2's own."""
    renamed = dict(fields)
    for alias, name in _ALIASES.items():
        if alias in fields and fields.get(name, fields[alias]) != fields[alias]:
            raise UserError(
                f"{file}: {name} is {fields[name]!r} and {alias} is {fields[alias]!r}: they are the same field, so"
                " remove one of them"
            )
        if alias in fields:
            renamed[name] = renamed.pop(alias)
    return renamed


def _first_problem(error: ValidationError, fields: dict[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    is_ours = first["type"] == "value_error"
    reason = first["msg"].removeprefix("Value error, ") if is_ours else uncapitalized(first["msg"])
    if name not in fields:
        return f'{name} is missing; if this is a GPT-2 model, add "model_type": "gpt2" to this file'
    return f"{name} is {json.dumps(fields[name])[:100]}; {reason}"
