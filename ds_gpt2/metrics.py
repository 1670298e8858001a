"""The records in a run's directory.

``metrics.jsonl`` has one JSON object a step, from the first step to the last, whatever happened in between;
``starts.jsonl`` has one for every start, ``metrics_replaced.jsonl`` those of steps that were trained again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_gpt2 import safe_json
from ds_gpt2.safe_files import no_links, open_own, read_small, regular_only, write_all

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
REPLACED = "metrics_replaced.jsonl"  # records of steps that were trained again
TIME = "%Y-%m-%dT%H:%M:%S%z"


class Records:
    """Appends to ``metrics.jsonl``. What could not be written is kept, and written whole with the next flush."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open = open_own(file, "ab", buffering=0)
        self._waiting = bytearray()

    def append(self, record: dict[str, Any]) -> None:
        self._waiting += json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"

    def flush(self, durable: bool = False) -> None:
        """
        Raises:
            OSError: not all of it is written; the file ends with a whole line, and the rest waits.
        """
        before = self._open.seek(0, os.SEEK_END)
        try:
            write_all(self._open.write, bytes(self._waiting))
        except OSError:
            self._open.truncate(before)
            raise
        self._waiting.clear()
        if durable:
            os.fsync(self._open.fileno())

    def close(self) -> None:
        self._open.close()


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The records in ``file``, each with its ``step``; none if there is no file. Lines cut by a crash are left out."""
    if not file.exists():
        return
    with open(file, encoding="utf-8", errors="replace", opener=regular_only) as lines:
        for line in lines:
            if (record := _parse(line)) is not None:
                yield record


def forget_after(file: Path, step: int) -> None:
    """Move what was recorded beyond ``step`` to ``REPLACED``: it is replayed, and curves must not overlap.

    A crash in between moves some of it twice.
    """
    if not file.exists():
        return
    partial, replaced = file.with_suffix(".tmp"), file.with_name(REPLACED)
    with contextlib.ExitStack() as opened:
        lines = opened.enter_context(open(file, encoding="utf-8", errors="replace", opener=regular_only))
        kept = opened.enter_context(open(partial, "w", encoding="utf-8", opener=no_links))
        moved = opened.enter_context(open(replaced, "a", encoding="utf-8", opener=no_links))
        for line in lines:
            if (record := _parse(line)) is not None:
                (kept if record["step"] <= step else moved).write(line)
        for target in (kept, moved):
            target.flush()
            os.fsync(target.fileno())
    os.replace(partial, file)
    if not replaced.stat().st_size:
        replaced.unlink()


def first_start(file: Path) -> float | None:
    """When the run of this ``starts.jsonl`` began, in seconds since 1970; None where that is not recorded."""
    try:
        with open(file, encoding="utf-8", opener=regular_only) as lines:
            return datetime.strptime(safe_json.parse(lines.readline())["time"], TIME).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The lines of ``starts.jsonl``, the newest last; none if there is no file. Lines cut by a crash are left out."""
    try:
        lines = read_small(file).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [start for line in lines if (start := _object(line)) is not None]


def started_from(starts: Iterable[dict[str, Any]]) -> list[int]:
    """The step that each start went on from, the newest last."""
    return [step if isinstance(step := start.get("from_step"), int) else 0 for start in starts]


def planned_steps(starts: Sequence[dict[str, Any]]) -> int | None:
    """How many steps the run is to have, as its newest start said; None where an earlier version did not."""
    steps = starts[-1].get("steps") if starts else None
    return steps if isinstance(steps, int) else None


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = safe_json.parse(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = safe_json.parse(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
