"""List the checkpoints in a directory: their contents, sizes and states."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import Generation, files_instead_of_checkpoints, wrong_size
from ds_gpt2.checkpoint.naming import LATEST, LATEST_BACKUP, MANIFEST, PARTIAL, role_of
from ds_gpt2.checkpoint.verify import Verdict, examine
from ds_gpt2.common.disk_usage import bytes_below
from ds_gpt2.common.errors import reason_of


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint, possibly unfinished, as ``list --json`` prints it."""

    tag: str
    kind: Literal["full", "weights", "unknown", "unfinished"]
    step: int | None
    epoch: float | None
    created: str | None
    age_seconds: float | None
    bytes: int
    freed_bytes: int  # by deleting this checkpoint only
    roles: list[str]  # other tags of the same files
    val_loss: float | None
    pointers: list[str]  # those of latest and latest_backup that point to it
    resumable: bool
    problem: str | None


def rows_of(directory: Path, found: Sequence[Generation]) -> list[CheckpointRow]:
    """Return one row per checkpoint; checkpoints that are deleted meanwhile are omitted."""
    inodes = {generation.tag: _inodes(generation.path) for generation in found}
    pointers = {name: commit.read_pointer(directory, name) for name in (LATEST, LATEST_BACKUP)}
    rows = []
    for tag in inodes:
        verdict = examine(directory / tag, [wrong_size])
        if verdict is not None:
            roles = [other for other in inodes if other != tag and inodes[other] & inodes[tag]]
            rows.append(_row(verdict, roles, [name for name, target in pointers.items() if target == tag]))
    return rows


def _row(verdict: Verdict, roles: list[str], pointers: list[str]) -> CheckpointRow:
    generation, known = verdict.generation, verdict.generation.manifest
    return CheckpointRow(
        tag=generation.tag,
        kind=known.kind if known else "unknown",
        step=step_of(generation),
        epoch=_finite(known.epoch) if known else None,
        created=known.created if known else None,
        age_seconds=_age(known.created) if known else None,
        bytes=bytes_below(generation.path),
        freed_bytes=freed_by([generation.path]),
        roles=roles,
        val_loss=_finite(known.val_loss) if known else None,
        pointers=pointers,
        resumable=not verdict.problem and not generation.weights_only,
        problem=verdict.problem,
    )


def unfinished(directory: Path) -> dict[Path, str]:
    """Return what has the name of a checkpoint but is incomplete, unreadable or a file, each with the reason."""
    found = files_instead_of_checkpoints(directory)
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        partial = path.name.endswith(PARTIAL)
        if not role_of(path.name.removesuffix(PARTIAL)) or not path.is_dir():
            continue
        try:
            if partial or not (path / MANIFEST).exists():
                found[path] = f"being {'written' if partial else 'deleted'}, or left by a crash"
        except OSError as error:
            found[path] = f"not readable: {reason_of(error)}"
    return found


def unfinished_row(path: Path, problem: str) -> CheckpointRow:
    """Return the row of an unfinished checkpoint."""
    return CheckpointRow(
        tag=path.name,
        kind="unfinished",
        step=None,
        epoch=None,
        created=None,
        age_seconds=None,
        bytes=bytes_below(path),
        freed_bytes=freed_by([path]),
        roles=[],
        val_loss=None,
        pointers=[],
        resumable=False,
        problem=problem,
    )


def _inodes(directory: Path) -> set[tuple[int, int]]:
    return {(file.st_dev, file.st_ino) for file in _files_in([directory])}


def freed_by(directories: Iterable[Path]) -> int:
    """Return the bytes that deleting ``directories`` frees; a hard-linked file is freed with its last link."""
    files = _files_in(directories)
    names = Counter((file.st_dev, file.st_ino) for file in files)
    sizes = {
        (file.st_dev, file.st_ino): file.st_size for file in files if file.st_nlink <= names[file.st_dev, file.st_ino]
    }
    return sum(sizes.values())


def _files_in(directories: Iterable[Path]) -> list[os.stat_result]:
    """Return the status of each directory entry that is a file; files deleted meanwhile are omitted."""
    found = []
    for directory in directories:
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        found.append(entry.stat(follow_symlinks=False))
    return found


def step_of(generation: Generation) -> int | None:
    """Return the step of a checkpoint; None if neither its manifest nor its name contains it."""
    return generation.step if generation.step >= 0 else None


def _finite(number: object) -> float | None:
    return number if isinstance(number, float) and math.isfinite(number) else None


def _age(created: str) -> float | None:
    """Return the seconds since an ISO 8601 time; None if the text is not a time."""
    with contextlib.suppress(ValueError, OverflowError):
        return round(time.time() - datetime.fromisoformat(created).timestamp(), 1)
    return None
