"""``starts.jsonl`` in a run's directory: one JSON object per start of the run, oldest first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import append_lines, read_small, regular_only

STARTS = "starts.jsonl"
TIME = "%Y-%m-%dT%H:%M:%S%z"

_TAIL_BYTES = 65_536  # of the file, in which the last line begins


def append_start(run_dir: Path, start: dict[str, Any]) -> None:
    """Append the record of a start, with its ``time`` in the form of ``TIME``.

    Raises:
        OSError: it cannot be written.
    """
    append_lines(run_dir / STARTS, json.dumps(start).encode() + b"\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of all starts, oldest first, without damaged lines; empty if there is no file.

    Raises:
        OSError: the file exists, but cannot be read.
    """
    try:
        lines = read_small(run_dir / STARTS).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [start for line in lines if (start := safe_json.parse_object(line)) is not None]


def last_start(run_dir: Path) -> dict[str, Any]:
    """Return the record of the last start, from the end of the file; empty if it is missing or damaged."""
    try:
        with open(run_dir / STARTS, "rb", opener=regular_only) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return safe_json.parse_object(file.read().splitlines()[-1]) or {}
    except (OSError, IndexError):
        return {}


def first_start(run_dir: Path) -> float | None:
    """Return the time of the first start in seconds since 1970; None if it is not recorded."""
    try:
        with open(run_dir / STARTS, "rb", opener=regular_only) as file:
            return time_of(safe_json.parse_object(file.readline()) or {})
    except OSError:
        return None


def time_of(start: dict[str, Any]) -> float | None:
    """Return the time of a start, a text or a number, in seconds since 1970; None if it is not recorded."""
    time = start.get("time")
    if time is not None and safe_json.is_time(time):
        return float(time)
    try:
        return datetime.strptime(str(time), TIME).timestamp()
    except (ValueError, OverflowError):
        return None


def started_from(starts: Iterable[dict[str, Any]]) -> list[int]:
    """Return the step that each start resumed from, oldest first; 0 for a new run."""
    return [step if isinstance(step := start.get("from_step"), int) else 0 for start in starts]


def planned_steps(starts: Sequence[dict[str, Any]]) -> int | None:
    """Return the planned number of steps of the newest start; None if an earlier version did not record it."""
    steps = starts[-1].get("steps") if starts else None
    return steps if isinstance(steps, int) else None
