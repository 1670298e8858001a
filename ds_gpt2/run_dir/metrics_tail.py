"""Read the newest records of ``metrics.jsonl``, or those before a given time, without reading the whole file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common.files import regular_only
from ds_gpt2.run_dir.metrics import METRICS, Record, parse_record

_BLOCK = 1 << 18  # bytes per read, a few hundred records
_MAX_BYTES = 1 << 24  # limit of what is read, however large the records are
_MAX_SKIPPED = 100  # lines skipped in the search for one that can be compared

_Condition = Callable[[Record], bool]


def newest(run_dir: Path, count: int) -> list[Record]:
    """Return the last ``count`` records, oldest first; empty if there is no file."""
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, "rb", opener=regular_only) as file:
        return _up_to(file, file.seek(0, os.SEEK_END), count)
    return []


def before(run_dir: Path, time: float, count: int) -> list[Record]:
    """Return the last ``count`` records before ``time`` (seconds since 1970), oldest first.

    The times in the file must ascend.
    """
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, "rb", opener=regular_only) as file:
        return _up_to(file, _end_before(file, time), count)
    return []


def at_steps(run_dir: Path, steps: Iterable[int]) -> list[Record]:
    """Return the records of ``steps``, in this order, without missing ones. The steps in the file must ascend."""
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, "rb", opener=regular_only) as file:
        found = (_at_step(file, step) for step in steps)
        return [record for record in found if record is not None]
    return []


def values(records: Sequence[Record], tag: str) -> list[float]:
    """Return the finite values of the scalar ``tag``."""
    found = (record.get(tag) for record in records)
    return [float(value) for value in found if isinstance(value, float | int) and math.isfinite(value)]


def time_of(record: Record) -> float | None:
    """Return the time of a record in seconds since 1970; None if it has none."""
    return None if (when := record.get("time")) is None else float(when)


def _up_to(file: BinaryIO, end: int, count: int) -> list[Record]:
    """Return the last ``count`` records before byte ``end``, without damaged lines."""
    data, begin = b"", end
    while begin > 0 and data.count(b"\n") <= count and len(data) < _MAX_BYTES:
        begin = max(0, begin - _BLOCK)
        file.seek(begin)
        data = file.read(min(_BLOCK, end - len(data) - begin)) + data
    lines = data.split(b"\n")
    if begin > 0:
        del lines[0]
    records = [record for line in lines if (record := parse_record(line)) is not None]
    return records[-count:]


def _at_step(file: BinaryIO, step: int) -> Record | None:
    offset = _bisect(file, lambda _: True, lambda record: bool(record["step"] < step))
    found = _record_from(file, offset, lambda _: True)
    return found if found is not None and found["step"] == step else None


def _end_before(file: BinaryIO, time: float) -> int:
    """Return the offset in bytes after the last record before ``time``; 0 if there is none."""
    offset = _bisect(file, lambda record: time_of(record) is not None, lambda record: (time_of(record) or 0) < time)
    if offset == 0:
        return 0
    file.seek(offset - 1)  # the start of the record, or a later byte of it
    return offset - 1 + len(file.readline())


def _bisect(file: BinaryIO, is_comparable: _Condition, is_before: _Condition) -> int:
    """Return the smallest offset in bytes after which no record satisfies ``is_before``; the records must ascend.

    Args:
        is_comparable: whether a record can be compared; others are skipped.
    """
    low, high = 0, file.seek(0, os.SEEK_END)
    while low < high:
        middle = (low + high) // 2
        later = _record_from(file, middle, is_comparable)
        if later is not None and is_before(later):
            low = middle + 1
        else:
            high = middle
    return low


def _record_from(file: BinaryIO, offset: int, is_comparable: _Condition) -> Record | None:
    """Return the first comparable record that begins at byte ``offset`` or later; None if there is none."""
    file.seek(max(0, offset - 1))
    if offset > 0:
        file.readline()
    for _ in range(_MAX_SKIPPED):
        if not (line := file.readline()):
            return None
        if (record := parse_record(line)) is not None and is_comparable(record):
            return record
    return None
