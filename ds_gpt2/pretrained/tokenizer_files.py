"""Check and write the tokenizer files of Hugging Face's libraries, using tiktoken's ranks.

These files spell tokens with one character per byte: printable characters of Latin-1 represent themselves, the other
bytes are U+0100 and following, in order (``bytes_to_unicode`` of OpenAI's gpt-2/src/encoder.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.data import tokenizer

_LARGEST_BYTES = 50_000_000  # of one file; those of GPT-2 have at most 4 MB

WRITTEN = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
VOCABULARY_FILES = ("vocab.json", "added_tokens.json", "tokenizer.json")
_CONFIG = "tokenizer_config.json"
# Accepted classes of transformers; PreTrainedTokenizerFast and TokenizersBackend are defined by tokenizer.json.
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "AutoTokenizer")


def check_tokenizer(directory: Path, rows: int) -> None:
    """Check that the tokenizer files of a directory, if there are any, are those of GPT-2.

    A model of another tokenizer uses the same ids for other tokens; neither its config nor its weights reveal that.

    Args:
        rows: of the embedding; those beyond GPT-2's vocabulary are padding unless a file assigns a token to them.

    Raises:
        UserError: a file cannot be read, or assigns another token to an id than GPT-2's tokenizer.
    """
    if (directory / _CONFIG).is_file():
        _check_class(directory / _CONFIG)
    tokens: dict[int, str] = {}
    for name in VOCABULARY_FILES:
        if (directory / name).is_file():
            tokens = tokens or {number: token for token, number in _vocabulary().items()}
            _compare(directory / name, _numbered(directory / name), tokens, rows)


def _check_class(file: Path) -> None:
    content = _json(file)
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is not a JSON object: download the model again, or delete this file if it is not needed"
        )
    name = content.get("tokenizer_class")
    if name is not None and name not in _CLASSES:
        raise UserError(
            f"{file}: tokenizer_class is {json.dumps(name)[:100]}, GPT-2's is {_CLASSES[0]}: only models"
            " with GPT-2's tokenizer are supported"
        )


def _compare(file: Path, theirs: dict[str, int], tokens: dict[int, str], rows: int) -> None:
    for token, number in theirs.items():
        if number < len(tokens) and tokens.get(number) != token:
            raise UserError(
                f"{file}: token {number:,} is {ascii(token)[:60]}, GPT-2's is {tokens.get(number)!a}: only models"
                " with GPT-2's tokenizer are supported"
            )
        if len(tokens) <= number < rows:
            raise UserError(
                f"{file}: token {number:,}, {ascii(token)[:60]}, is not one of GPT-2's {len(tokens):,}: remove it with"
                f" transformers' resize_token_embeddings({len(tokens)}) and save GPT-2's own tokenizer"
            )


def _numbered(file: Path) -> dict[str, int]:
    """Return the ids of the tokens in a file."""
    content = _json(file)
    if file.name == "tokenizer.json":
        try:
            added = content.get("added_tokens") or []
            content = content["model"]["vocab"] | {each["content"]: each["id"] for each in added}
        except (AttributeError, KeyError, TypeError):
            raise UserError(
                f"{file} cannot be read: model.vocab and added_tokens are not in the format of the tokenizers library"
            ) from None
    if not isinstance(content, dict) or any(type(number) is not int for number in content.values()):
        raise UserError(f"{file} is not a JSON object of tokens and their integer ids: download the model again")
    return content


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > _LARGEST_BYTES:
            raise UserError(
                f"{file} is larger than {_LARGEST_BYTES:,} bytes, so it is not of GPT-2's tokenizer: only models with"
                " that tokenizer are supported"
            )
        return safe_json.read(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line_reason(error, 200)}") from None


def write_tokenizer(directory: Path, sequence_length: int) -> None:
    """Write the files ``WRITTEN`` to ``directory``.

    Args:
        sequence_length: recorded as ``model_max_length``.
    """
    ranks, spelled, vocabulary = _ranks(), _spelling(), _vocabulary()
    merges = [" ".join("".join(spelled[byte] for byte in part) for part in pair) for pair in _merges(ranks)]
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": sequence_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.END_OF_TEXT_MARK,
        "eos_token": tokenizer.END_OF_TEXT_MARK,
        "unk_token": tokenizer.END_OF_TEXT_MARK,
    }
    _write(directory / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(directory / "tokenizer.json", json.dumps(_fast(vocabulary, merges), ensure_ascii=False))
    _write(directory / "tokenizer_config.json", json.dumps(config, indent=2))


def _fast(vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``, in format 1.0 of the tokenizers library."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": tokenizer.END_OF_TEXT, "content": tokenizer.END_OF_TEXT_MARK, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _ranks() -> dict[bytes, int]:
    return {tokenizer.gpt2().decode_single_token_bytes(rank): rank for rank in range(tokenizer.END_OF_TEXT)}


def _vocabulary() -> dict[str, int]:
    """Return the id of every token, by its spelling in the files."""
    spelled = _spelling()
    vocabulary = {"".join(spelled[byte] for byte in token): rank for token, rank in _ranks().items()}
    return {**vocabulary, tokenizer.END_OF_TEXT_MARK: tokenizer.END_OF_TEXT}


def _spelling() -> list[str]:
    """Return the character of each byte."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + number) for number in range(256))
    return [chr(byte) if byte in itself else next(others) for byte in range(256)]


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two tokens that are merged into each longer token, in the order of the ranks."""
    for token, rank in ranks.items():
        if len(token) > 1:
            yield _halves(token, rank, ranks)


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts of ``token`` after applying all merges of lower rank."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[first] < rank, "both halves of a token have lower ranks"
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
