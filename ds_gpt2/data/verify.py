"""Before training: is the data what it was, and every token one that GPT-2 has? Read once, shared out, remembered."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import regular_only, replace_file
from ds_gpt2.data.dataset import Dataset
from ds_gpt2.data.shards import TOKEN_BYTES, Tokens, start_of
from ds_gpt2.distributed import collectives
from ds_gpt2.model.shape import VOCABULARY

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 25

_Known = dict[str, dict[str, Any]]  # by name in the dataset: the size, time and hash that a shard had


def check_shards(dataset: Dataset, memory: Path) -> None:
    """Read all shards that this run has not read since they last changed; every rank takes its share.

    Args:
        memory: a JSON file of what was read before; rank 0 writes it.

    Raises:
        UserError: on every rank: a shard is not the one of the index or, where there is none, not the one that the
            run has read before; a token id out of range, with its shard and place.
    """
    known: _Known = collectives.gather_objects(_remembered(memory))[0]  # rank 0's, so that all agree on what is left
    left = [shard for shard in dataset.shards if not _is_known(dataset.dir, shard.file, known)]
    if left:
        log.info(f"checking {sum(shard.tokens for shard in left):,} tokens, once ...")
    mine = left[collectives.rank() :: collectives.world_size()]
    promised = {shard.file: shard.sha256 or known.get(shard.file, {}).get("sha256") for shard in mine}
    for found in collectives.gather_objects(collectives.call_on_all_ranks(lambda: _check(dataset.dir, promised))):
        known |= found
    if left and collectives.is_main():
        replace_file(memory, json.dumps(known, indent=1) + "\n")


def _check(directory: Path, promised: dict[str, str | None]) -> _Known:
    """What is to be remembered of the shards in ``directory`` whose hashes are ``promised``."""
    found: _Known = {}
    for name, sha256 in promised.items():
        path = directory / name
        stamp, digest = _stamp(path), _read(path)
        if sha256 not in (None, digest):
            raise UserError(f"shard {path} is not what it was (its sha256 is another): restore it or prepare it again")
        found[name] = {"stamp": stamp, "sha256": digest}
    return found


def _read(path: Path) -> str:
    """Read a shard from end to end; returns its sha256."""
    try:
        position, start, digest = 0, start_of(path), hashlib.sha256()
        with open(path, "rb", opener=regular_only) as file:
            digest.update(file.read(start))
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                _check_tokens(path, np.frombuffer(block, "<u2"), position)
                position += len(block) // TOKEN_BYTES
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {reason_of(error)}") from None
    return digest.hexdigest()


def _check_tokens(path: Path, tokens: Tokens, position: int) -> None:
    place = int(tokens.argmax())
    if tokens[place] >= VOCABULARY:
        raise UserError(
            f"shard {path} has token id {tokens[place]} at position {position + place}: GPT-2's ids go from 0 to"
            f" {VOCABULARY - 1}; the file is damaged or was made with another tokenizer"
        )


def _is_known(directory: Path, name: str, known: _Known) -> bool:
    return name in known and known[name]["stamp"] == _stamp(directory / name)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _remembered(memory: Path) -> _Known:
    try:
        content = safe_json.read(memory)
        # Earlier versions remembered absolute paths.
        return {Path(path).name: {"stamp": each["stamp"], "sha256": each["sha256"]} for path, each in content.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}  # nothing remembered, or not readable: read again
