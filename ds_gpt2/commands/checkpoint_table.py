"""The table of ``list``: what a run's checkpoints are, hold and cost."""

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
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.naming import LATEST, LATEST_BACKUP, MANIFEST, PARTIAL, role_of
from ds_gpt2.checkpoint.verify import Verdict, examine, wrong_size
from ds_gpt2.common.errors import reason_of
from ds_gpt2.common.formatting import duration, size


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint, or what is left of one, as ``list --json`` prints it."""

    tag: str
    kind: Literal["full", "weights", "unknown", "unfinished"]
    step: int | None
    epoch: float | None
    created: str | None
    age_seconds: float | None
    bytes: int
    freed_bytes: int  # if it is deleted and nothing else
    roles: list[str]  # other tags of the same files
    val_loss: float | None
    pointers: list[str]  # of latest and latest_backup those that name it
    resumable: bool
    problem: str | None


def rows_of(directory: Path, found: Sequence[Generation]) -> list[CheckpointRow]:
    """One row a checkpoint; what vanishes meanwhile is left out."""
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
        bytes=_bytes_in(generation.path),
        freed_bytes=freed_by([generation.path]),
        roles=roles,
        val_loss=_finite(known.val_loss) if known else None,
        pointers=pointers,
        resumable=not verdict.problem and not generation.weights_only,
        problem=verdict.problem,
    )


def unfinished(directory: Path) -> dict[Path, str]:
    """Directories with the name of a checkpoint that are none, or cannot be read; and what they are."""
    found = {}
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


def unfinished_row(path: Path, what: str) -> CheckpointRow:
    return CheckpointRow(
        tag=path.name,
        kind="unfinished",
        step=None,
        epoch=None,
        created=None,
        age_seconds=None,
        bytes=_bytes_in(path),
        freed_bytes=freed_by([path]),
        roles=[],
        val_loss=None,
        pointers=[],
        resumable=False,
        problem=what,
    )


def _bytes_in(directory: Path) -> int:
    return sum({(file.st_dev, file.st_ino): file.st_size for file in _files_in([directory])}.values())


def _inodes(directory: Path) -> set[tuple[int, int]]:
    return {(file.st_dev, file.st_ino) for file in _files_in([directory])}


def freed_by(directories: Iterable[Path]) -> int:
    """The bytes that deleting ``directories`` gives back: a file goes with the last of its names."""
    files = _files_in(directories)
    names = Counter((file.st_dev, file.st_ino) for file in files)
    sizes = {
        (file.st_dev, file.st_ino): file.st_size for file in files if file.st_nlink <= names[file.st_dev, file.st_ino]
    }
    return sum(sizes.values())


def _files_in(directories: Iterable[Path]) -> list[os.stat_result]:
    """The status of every file, once for each of its names; one that vanishes meanwhile is left out."""
    found = []
    for directory in directories:
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        found.append(entry.stat(follow_symlinks=False))
    return found


def step_of(generation: Generation) -> int | None:
    return generation.step if generation.step >= 0 else None


def _finite(number: object) -> float | None:
    return number if isinstance(number, float) and math.isfinite(number) else None


def _age(created: str) -> float | None:
    """Seconds since then; None where the text is no time."""
    with contextlib.suppress(ValueError, OverflowError):
        return round(time.time() - datetime.fromisoformat(created).timestamp(), 1)
    return None


def as_table(rows: Sequence[CheckpointRow]) -> str:
    cells = [("tag", "step", "epoch", "age", "size", "frees", "val loss", "state"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *middle, last = range(len(widths))
    return "\n".join(
        "  ".join([line[first].ljust(widths[first]), *(line[i].rjust(widths[i]) for i in middle), line[last]])
        for line in cells
    )


def _cells(row: CheckpointRow) -> tuple[str, ...]:
    return (
        row.tag,
        "" if row.step is None else str(row.step),
        "" if row.epoch is None else _fixed(row.epoch, 2),
        "" if row.age_seconds is None else duration(row.age_seconds),
        size(row.bytes),
        size(row.freed_bytes),
        "" if row.val_loss is None else _fixed(row.val_loss, 4),
        "; ".join([_state(row), *row.pointers, *([f"same files as {', '.join(row.roles)}"] if row.roles else [])]),
    )


def _fixed(number: float, digits: int) -> str:
    """So many digits after the point; of a number that a damaged file claims, three significant ones."""
    return f"{number:.{digits}f}" if abs(number) < 1e6 else f"{number:.3g}"


def _state(row: CheckpointRow) -> str:
    if row.problem is not None:
        return row.problem if row.kind == "unfinished" else f"BAD: {row.problem}"
    return "weights only" if row.kind == "weights" else "resumable"
