"""Shards: files of uint16 tokens, little-endian.

Three formats are read: .bin with a 1 KiB header (llm.c, and what ``prepare`` writes), .npy (build-nanogpt), and .bin
without a header (nanoGPT), which is recognized by its name (train.bin, val.bin) and plausible content.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import regular_only
from ds_gpt2.data.tokenizer import END_OF_TEXT

Tokens = npt.NDArray[np.uint16]

# The header of llm.c's dev/data/data_common.py: 256 int32, of which magic, version and token count are used.
_MAGIC = 20_240_520
_VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2

SUFFIXES = (".bin", ".npy")

_HEADERLESS = re.compile(r"(train|val|valid|validation|test)\.bin", re.IGNORECASE)  # nanoGPT's names
_SAMPLE_TOKENS = 1 << 16  # checked at each end of a file without a header
_MOST_ZEROS = 0.25  # share of zero tokens; damaged headers and tokens of 4 bytes have more
_BYTE_TOKENS = 256  # lower ids are single bytes, which are rare in text
_ENOUGH_TOKENS = 1000  # sample size from which the absence of higher ids is significant


def is_shard(name: str) -> bool:
    """Return whether a file is a shard by its name. Hidden files such as macOS's ``._train.bin`` are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def count_tokens(path: Path) -> int:
    """Return the number of tokens in a shard, from its header after comparing it with the file's size.

    Raises:
        UserError: the file is missing, truncated, unreadable or not a shard.
    """
    return len(open_shard(path))


def open_shard(path: Path) -> Tokens:
    """Return the tokens of a shard, (tokens,) uint16, memory-mapped and read-only.

    Raises:
        UserError: the file is missing, truncated, unreadable or not a shard.
    """
    try:
        return _open(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: restore it or prepare the data again") from None
    except (OSError, EOFError) as error:
        raise UserError(f"shard {path} cannot be read: {reason_of(error)}") from None


def start_of(path: Path) -> int:
    """Return the byte offset of a shard's first token.

    Raises:
        UserError: the file is truncated or not a shard.
        OSError: the file cannot be read.
    """
    return int(getattr(_open(path), "offset", HEADER_BYTES))  # a shard without tokens is not a memory map


def token_problem(token: int, position: int | None = None) -> str | None:
    """Return the problem of a token id, as the end of an error message; None if GPT-2 has the token.

    Args:
        position: of the token in its shard, for the message.
    """
    if token <= END_OF_TEXT:
        return None
    where = "" if position is None else f" at position {position}"
    return (
        f"has token id {token}{where}, GPT-2's highest is {END_OF_TEXT}: it is damaged, or was encoded by another"
        " tokenizer"
    )


def header_of(tokens: int) -> bytes:
    """Return the header of a .bin shard with this number of tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = _MAGIC, _VERSION, tokens
    return header.tobytes()


def _open(path: Path) -> Tokens:
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"shard {path} is not a regular file")
    return _open_npy(path) if path.suffix.lower() == ".npy" else _open_bin(path)


def _open_bin(path: Path) -> Tokens:
    size = path.stat().st_size
    with open(path, "rb", opener=regular_only) as file:
        header = np.frombuffer(file.read(HEADER_BYTES), "<i4") if size >= HEADER_BYTES else np.zeros(256, "<i4")
    if header[0] != _MAGIC or header[1] != _VERSION:
        return _open_headerless(path, size)
    tokens = int(header[2])
    expected = HEADER_BYTES + TOKEN_BYTES * tokens
    if size != expected:
        raise UserError(f"shard {path} has {size} bytes but its header requires {expected}: copy or prepare it again")
    return _mapped(path, HEADER_BYTES, tokens)


def _open_headerless(path: Path, size: int) -> Tokens:
    """Open a file as written by nanoGPT's prepare.py with GPT-2's tokenizer.

    Raises:
        UserError: its name or content is not that of such a file.
    """
    if not _HEADERLESS.fullmatch(path.name):
        raise UserError(
            f"{path} is not a token shard: it lacks llm.c's header (magic {_MAGIC}, version 1); shards without"
            " a header, as nanoGPT writes them, must be named train.bin and val.bin"
        )
    if (problem := _problem_of_headerless(path, size)) is not None:
        raise UserError(
            f"{path} is not a token shard: it lacks llm.c's header (magic {_MAGIC}, version 1), and as a shard of"
            f" nanoGPT it {problem}; copy or prepare it again"
        )
    return _mapped(path, 0, size // TOKEN_BYTES)


def _problem_of_headerless(path: Path, size: int) -> str | None:
    if path.with_name("meta.pkl").exists():
        return "has characters as tokens (its directory has a meta.pkl), not GPT-2's tokens"
    if size == 0 or size % TOKEN_BYTES:
        return "is empty" if size == 0 else f"is truncated ({size} bytes, 2 per token)"
    first, last = _both_ends(path)
    highest = max(int(first.max()), int(last.max()))
    if (problem := token_problem(highest)) is not None:
        return problem
    header = first[: HEADER_BYTES // TOKEN_BYTES]
    if max(_share_of_zeros(header), _share_of_zeros(first), _share_of_zeros(last)) > _MOST_ZEROS:
        return "has too many zeros: a damaged header, or tokens of 4 bytes"
    if highest < _BYTE_TOKENS and len(first) >= _ENOUGH_TOKENS:
        return f"has no token id above {highest}: characters, not GPT-2's tokens"
    return None


def _both_ends(path: Path) -> tuple[Tokens, Tokens]:
    """Return the first and the last tokens. They are read, not mapped, so that an I/O error is an OSError."""
    count = TOKEN_BYTES * _SAMPLE_TOKENS
    with open(path, "rb", opener=regular_only) as file:
        first = file.read(count)
        file.seek(-min(count, os.fstat(file.fileno()).st_size), os.SEEK_END)
        last = file.read(count)
    return np.frombuffer(first, "<u2"), np.frombuffer(last, "<u2")


def _share_of_zeros(tokens: Tokens) -> float:
    return 1 - np.count_nonzero(tokens) / len(tokens)


def _mapped(path: Path, offset: int, tokens: int) -> Tokens:
    if tokens == 0:
        return np.zeros(0, np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(tokens,))


def _open_npy(path: Path) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, dtype = list(tokens.shape), tokens.dtype
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise SyntaxError, MemoryError, KeyError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"shard {path} is truncated or not a .npy file: {reason}") from None
    if len(shape) != 1 or dtype != np.uint16:
        raise UserError(f"shard {path} is an array {dtype}{shape}, not a one-dimensional array of uint16 tokens")
    return tokens
