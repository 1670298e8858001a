"""Verify the shards before training: the ranks share the work. Each shard is read once; results are recorded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file
from ds_gpt2.data.dataset import Dataset
from ds_gpt2.data.verify import read_content
from ds_gpt2.distributed import collectives

log = logging.getLogger(__name__)

_Record = dict[str, dict[str, Any]]  # by shard: "stamp" (size, modification time in ns) and "sha256" when verified


def check_shards(dataset: Dataset, record_file: Path) -> None:
    """Read all shards that changed since this run last read them. The ranks share the work.

    Args:
        record_file: JSON file with the record of earlier calls; written by rank 0.

    Raises:
        UserError: on every rank, if a shard does not have the checksum of the index or, without an index, of the
            record; or if a token id is out of range.
    """
    record: _Record = collectives.gather_objects(_read_record(record_file))[0]  # rank 0's, the same on all ranks
    changed = [shard for shard in dataset.shards if not _is_verified(dataset.dir, shard.file, record)]
    if changed:
        log.info(f"verifying {sum(shard.tokens for shard in changed):,} tokens ...")
    mine = changed[collectives.rank() :: collectives.world_size()]
    expected = {shard.file: shard.sha256 or record.get(shard.file, {}).get("sha256") for shard in mine}
    for found in collectives.gather_objects(collectives.call_on_all_ranks(lambda: _check(dataset.dir, expected))):
        record |= found
    if changed and collectives.is_main():
        replace_file(record_file, json.dumps(record, indent=1) + "\n")


def _check(directory: Path, expected: dict[str, str | None]) -> _Record:
    """Return the record of the shards in ``directory`` whose hashes are ``expected``; None if no hash is known.

    Raises:
        UserError: see ``check_shards``, or a shard cannot be read.
    """
    found: _Record = {}
    for name, sha256 in expected.items():
        path = directory / name
        stamp, content = _stamp(path), read_content(path)
        if content.problem is not None:
            raise UserError(f"shard {path} {content.problem}")
        if sha256 not in (None, content.sha256):
            raise UserError(f"shard {path} was changed (checksum mismatch): restore it or prepare the data again")
        found[name] = {"stamp": stamp, "sha256": content.sha256}
    return found


def _is_verified(directory: Path, name: str, record: _Record) -> bool:
    return name in record and record[name]["stamp"] == _stamp(directory / name)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_record(record_file: Path) -> _Record:
    try:
        content = safe_json.read(record_file)
        # Earlier versions recorded absolute paths.
        return {Path(path).name: {"stamp": each["stamp"], "sha256": each["sha256"]} for path, each in content.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}  # no record, or a damaged one: all shards are read again
