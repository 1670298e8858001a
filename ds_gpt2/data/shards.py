"""One file of tokens: raw little-endian uint16 behind a 1 KiB header (ours and llm.c's), or build-nanogpt's .npy.

nanoGPT's train.bin and val.bin have no header. They are known by these names, and by content that is plausible.
"""

from __future__ import annotations

import hashlib
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

_HEADERLESS = re.compile(r"(train|val|valid|validation|test)\.bin", re.IGNORECASE)  # nanoGPT's names, and no others
_SAMPLE_TOKENS = 1 << 16  # looked at, at each end of a file without a header
_MOST_ZEROS = 0.25  # of its tokens; a damaged header is mostly zeros, and so are tokens of 4 bytes
_BYTE_TOKENS = 256  # ids below are single bytes, which text hardly has
_ENOUGH_TOKENS = 1000  # to tell by them


def is_shard(name: str) -> bool:
    """Return whether a file is a shard by its name; hidden ones are other programs' notes (``._train.bin``)."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def count_tokens(path: Path) -> int:
    """Number of tokens in a shard, from its header, checked against the file's size.

    Raises:
        UserError: not a shard, cut short, or unreadable.
    """
    return len(open_shard(path))


def open_shard(path: Path) -> Tokens:
    """Return the shard's tokens, memory-mapped and read-only.

    Raises:
        UserError: not a shard, cut short, or unreadable.
    """
    try:
        return _open(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: restore it or prepare the data again") from None
    except (OSError, EOFError) as error:
        raise UserError(f"shard {path} cannot be read: {reason_of(error)}") from None


def start_of(path: Path) -> int:
    """The byte at which a shard's tokens begin.

    Raises:
        UserError: not a shard, or cut short.
        OSError: it cannot be read.
    """
    return int(getattr(_open(path), "offset", HEADER_BYTES))  # one without tokens is no memory map


def header_of(tokens: int) -> bytes:
    """What a .bin shard of so many tokens begins with."""
    header = np.zeros(256, "<i4")
    header[:3] = _MAGIC, _VERSION, tokens
    return header.tobytes()


def sha256(path: Path) -> str:
    """Hex digest of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=regular_only) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        raise UserError(f"shard {path} has {size} bytes but its header promises {expected}: copy or prepare it again")
    return _mapped(path, HEADER_BYTES, tokens)


def _open_headerless(path: Path, size: int) -> Tokens:
    """
    Raises:
        UserError: it is not what nanoGPT's prepare.py writes with GPT-2's tokenizer.
    """
    if not _HEADERLESS.fullmatch(path.name):
        raise UserError(
            f"{path} is not a token shard: it lacks llm.c's header (magic {_MAGIC}, version 1); nanoGPT's shards, which"
            " have none, are read under their names train.bin and val.bin"
        )
    if (problem := _problem_of_headerless(path, size)) is not None:
        raise UserError(
            f"{path} is not a token shard: it lacks llm.c's header (magic {_MAGIC}, version 1), and as nanoGPT's"
            f" without a header it {problem}: copy or prepare it again"
        )
    return _mapped(path, 0, size // TOKEN_BYTES)


def _problem_of_headerless(path: Path, size: int) -> str | None:
    if path.with_name("meta.pkl").exists():
        return "has characters for tokens (meta.pkl lies beside it), not GPT-2's"
    if size == 0 or size % TOKEN_BYTES:
        return "is empty" if size == 0 else f"is cut ({size} bytes, 2 a token)"
    begin, end = _both_ends(path)
    highest = max(int(begin.max()), int(end.max()))
    if highest > END_OF_TEXT:
        return f"has token id {highest}, GPT-2's end at {END_OF_TEXT}"
    head = begin[: HEADER_BYTES // TOKEN_BYTES]
    if max(_share_of_zeros(head), _share_of_zeros(begin), _share_of_zeros(end)) > _MOST_ZEROS:
        return "has too many zeros: a damaged header, or tokens of 4 bytes"
    if highest < _BYTE_TOKENS and len(begin) >= _ENOUGH_TOKENS:
        return f"has no token id above {highest}: characters, not GPT-2's tokens"
    return None


def _both_ends(path: Path) -> tuple[Tokens, Tokens]:
    """The first tokens and the last ones, read and not mapped: an error of the disk is an error."""
    count = TOKEN_BYTES * _SAMPLE_TOKENS
    with open(path, "rb", opener=regular_only) as file:
        begin = file.read(count)
        file.seek(-min(count, os.fstat(file.fileno()).st_size), os.SEEK_END)
        end = file.read(count)
    return np.frombuffer(begin, "<u2"), np.frombuffer(end, "<u2")


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
    except Exception as error:  # a damaged header fails in many ways (SyntaxError, MemoryError, KeyError ...)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"shard {path} is cut short or not a .npy file: {reason}") from None
    if len(shape) != 1 or dtype != np.uint16:
        raise UserError(f"shard {path} holds {dtype}{shape}, not a row of uint16 tokens")
    return tokens
