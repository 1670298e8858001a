"""Verify the shards before training. The ranks share the work; each file is read once, and the result is recorded."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import replace_file
from ds_gpt2.data.dataset import Dataset
from ds_gpt2.data.verify import read_content
from ds_gpt2.distributed import collectives

log = logging.getLogger(__name__)

_Record = dict[str, dict[str, Any]]  # by shard: "stamp" (size, modification time in ns) and "sha256" when verified


def check_shards(dataset: Dataset, record_file: Path) -> None:
    """Read all shards that changed since this run last read them. The ranks that read the same files share the work.

    Args:
        record_file: JSON file with the record of earlier calls; a further copy of the data, on other machines, has a
            file of its own beside it.

    Raises:
        UserError: on every rank, if a shard does not have the checksum of the index or, without an index, of the
            record and of the other copies; or if a token id is out of range.
    """
    copies = _copies(dataset)
    ranks = copies[collectives.rank()]
    host = collectives.gather_objects(socket.gethostname())[ranks[0]]
    own_file = record_file if ranks[0] == 0 else record_file.with_name(f"{record_file.stem}_{host}.json")
    record: _Record = collectives.gather_objects(_read_record(own_file))[ranks[0]]  # the same on the ranks of a copy
    changed = [shard for shard in dataset.shards if not _is_verified(dataset.dir, shard.file, record)]
    if changed:
        log.info(f"verifying {sum(shard.tokens for shard in changed):,} tokens ...")
    mine = changed[ranks.index(collectives.rank()) :: len(ranks)]
    expected = {shard.file: shard.sha256 or record.get(shard.file, {}).get("sha256") for shard in mine}
    found = collectives.gather_objects(collectives.call_on_all_ranks(lambda: _check(dataset.dir, expected)))
    for rank in ranks:
        record |= found[rank]
    if any(other != ranks for other in copies):  # the same on all ranks
        collectives.raise_on_all_ranks(_difference(dataset, collectives.gather_objects((host, record))))
    if changed and collectives.rank() == ranks[0]:
        replace_file(own_file, json.dumps(record, indent=1) + "\n")


def _copies(dataset: Dataset) -> list[list[int]]:
    """Return for each rank the ranks that read the same files: all, unless machines have copies of the data."""
    if not collectives.spans_machines():
        return [list(range(collectives.world_size()))] * collectives.world_size()

    def files() -> list[list[int]]:
        paths = [dataset.dir / shard.file for shard in dataset.shards]
        try:
            return [[path.stat().st_ino, *_stamp(path)] for path in paths]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {reason_of(error)}") from None

    found = collectives.gather_objects(collectives.call_on_all_ranks(files))
    return [[rank for rank, other in enumerate(found) if other == own] for own in found]


def _difference(dataset: Dataset, records: Sequence[tuple[str, _Record]]) -> str | None:
    """Return which shard differs between two copies of the data, if any.

    Args:
        records: host and record of each rank's copy.
    """
    first_host, first = records[0]
    for host, record in records[1:]:
        for name in first:
            if name in record and record[name]["sha256"] != first[name]["sha256"]:
                return f"shard {dataset.dir / name} differs between host {first_host} and host {host}: copy it again"
    return None


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
