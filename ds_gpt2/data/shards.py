"""One file of tokens: raw little-endian uint16 behind a 1 KiB header (ours and llm.c's), or build-nanogpt's .npy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ds_gpt2.errors import UserError

Tokens = npt.NDArray[np.uint16]

# The header of llm.c's dev/data/data_common.py: 256 int32, of which magic, version and token count are used.
_MAGIC = 20_240_520
_VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2

SUFFIXES = (".bin", ".npy")


def count_tokens(path: Path) -> int:
    """Number of tokens in a shard, from its header, checked against the file's size.

    Raises:
        UserError: not a shard, cut short, or unreadable.
    """
    return len(open_shard(path))


def open_shard(path: Path) -> Tokens:
    """The shard's tokens, memory-mapped and read-only.

    Raises:
        UserError: not a shard, cut short, or unreadable.
    """
    try:
        return _open(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: restore it or prepare the data again") from None
    except (OSError, EOFError) as error:
        raise UserError(f"shard {path} cannot be read: {error}") from None


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
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> Tokens:
    return _open_npy(path) if path.suffix == ".npy" else _open_bin(path)


def _open_bin(path: Path) -> Tokens:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), "<i4") if size >= HEADER_BYTES else np.zeros(256, "<i4")
    if header[0] != _MAGIC or header[1] != _VERSION:
        raise UserError(f"{path} is not a token shard: it lacks llm.c's header (magic {_MAGIC}, version 1)")
    tokens = int(header[2])
    expected = HEADER_BYTES + TOKEN_BYTES * tokens
    if size != expected:
        raise UserError(f"shard {path} has {size} bytes but its header promises {expected}: copy or prepare it again")
    if tokens == 0:
        return np.zeros(0, np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def _open_npy(path: Path) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"shard {path} is cut short or not a .npy file: {error}") from None
    if tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"shard {path} holds {tokens.dtype}{list(tokens.shape)}, not a row of uint16 tokens")
    return tokens
