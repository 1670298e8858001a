"""Verify the shards before training: checksums and token ids. Each shard is read once; results are recorded."""

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

_Record = dict[str, dict[str, Any]]  # by shard: "stamp" (size, modification time in ns) and "sha256" when verified


def check_shards(dataset: Dataset, memory: Path) -> None:
    """Read all shards that changed since this run last read them. The ranks share the work.

    Args:
        memory: JSON file with the record of earlier calls; written by rank 0.

    Raises:
        UserError: on every rank, if a shard does not have the checksum of the index or, without an index, of the
            record; or if a token id is out of range.
    """
    record: _Record = collectives.gather_objects(_read_record(memory))[0]  # rank 0's, the same on all ranks
    changed = [shard for shard in dataset.shards if not _is_verified(dataset.dir, shard.file, record)]
    if changed:
        log.info(f"verifying {sum(shard.tokens for shard in changed):,} tokens ...")
    mine = changed[collectives.rank() :: collectives.world_size()]
    expected = {shard.file: shard.sha256 or record.get(shard.file, {}).get("sha256") for shard in mine}
    for found in collectives.gather_objects(collectives.call_on_all_ranks(lambda: _check(dataset.dir, expected))):
        record |= found
    if changed and collectives.is_main():
        replace_file(memory, json.dumps(record, indent=1) + "\n")


def _check(directory: Path, expected: dict[str, str | None]) -> _Record:
    """Return the record of the shards in ``directory`` whose hashes are ``expected``; None if no hash is known.

    Raises:
        UserError: see ``check_shards``, or a shard cannot be read.
    """
    found: _Record = {}
    for name, sha256 in expected.items():
        path = directory / name
        stamp, digest = _stamp(path), _read(path)
        if sha256 not in (None, digest):
            raise UserError(f"shard {path} was changed (checksum mismatch): restore it or prepare the data again")
        found[name] = {"stamp": stamp, "sha256": digest}
    return found


def _read(path: Path) -> str:
    """Read a whole shard and check its token ids; return its sha256."""
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
    index = int(tokens.argmax())
    if tokens[index] >= VOCABULARY:
        raise UserError(
            f"shard {path} has token id {tokens[index]} at position {position + index}: GPT-2's ids are 0 to"
            f" {VOCABULARY - 1}; the file is damaged or was encoded by another tokenizer"
        )


def _is_verified(directory: Path, name: str, record: _Record) -> bool:
    return name in record and record[name]["stamp"] == _stamp(directory / name)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_record(memory: Path) -> _Record:
    try:
        content = safe_json.read(memory)
        # Earlier versions recorded absolute paths.
        return {Path(path).name: {"stamp": each["stamp"], "sha256": each["sha256"]} for path, each in content.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}  # no record, or a damaged one: all shards are read again
