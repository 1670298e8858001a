"""The newest records of ``metrics.jsonl``, and those before a moment, without reading the whole file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common.files import regular_only
from ds_gpt2.run_dir.metrics import METRICS, Record, parse_record

_BLOCK = 1 << 18  # bytes read at once, some hundred records
_MOST = 1 << 24  # bytes looked at for some records, however large they are
_WITHOUT_TIME = 100  # lines skipped in search of one that can be compared

_Condition = Callable[[Record], bool]


def newest(run_dir: Path, count: int) -> list[Record]:
    """The last ``count`` records, oldest first; none if there is no file."""
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, "rb", opener=regular_only) as file:
        return _up_to(file, file.seek(0, os.SEEK_END), count)
    return []


def before(run_dir: Path, time: float, count: int) -> list[Record]:
    """The last ``count`` records of before ``time``, in seconds since 1970, oldest first; times ascend in the file."""
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, "rb", opener=regular_only) as file:
        return _up_to(file, _end_before(file, time), count)
    return []


def at_steps(run_dir: Path, steps: Iterable[int]) -> list[Record]:
    """The records of ``steps``, in that order, without those that are missing; steps ascend in the file."""
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, "rb", opener=regular_only) as file:
        found = (_at_step(file, step) for step in steps)
        return [record for record in found if record is not None]
    return []


def values(records: Sequence[Record], tag: str) -> list[float]:
    """The finite ones of a scalar."""
    found = (record.get(tag) for record in records)
    return [float(value) for value in found if isinstance(value, float | int) and math.isfinite(value)]


def time_of(record: Record) -> float | None:
    """Seconds since 1970."""
    return None if (when := record.get("time")) is None else float(when)


def _up_to(file: BinaryIO, end: int, count: int) -> list[Record]:
    """The last ``count`` records that lie before byte ``end``; lines cut by a crash are left out."""
    data, begin = b"", end
    while begin > 0 and data.count(b"\n") <= count and len(data) < _MOST:
        begin = max(0, begin - _BLOCK)
        file.seek(begin)
        data = file.read(min(_BLOCK, end - len(data) - begin)) + data
    lines = data.split(b"\n")
    if begin > 0:
        del lines[0]
    records = [record for line in lines if (record := parse_record(line)) is not None]
    return records[-count:]


def _at_step(file: BinaryIO, step: int) -> Record | None:
    place = _first_place(file, lambda _: True, lambda record: bool(record["step"] < step))
    found = _record_from(file, place, lambda _: True)
    return found if found is not None and found["step"] == step else None


def _end_before(file: BinaryIO, time: float) -> int:
    """The byte behind the last record of before ``time``; 0 where there is none."""
    place = _first_place(file, lambda record: time_of(record) is not None, lambda record: (time_of(record) or 0) < time)
    if place == 0:
        return 0
    file.seek(place - 1)  # where the record begins, or within what follows its time
    return place - 1 + len(file.readline())


def _first_place(file: BinaryIO, counts: _Condition, is_before: _Condition) -> int:
    """The first byte from which on no record begins that is before what is searched for; records ascend in the file.

    Args:
        counts: whether a record can be compared; others are skipped.
    """
    low, high = 0, file.seek(0, os.SEEK_END)
    while low < high:
        middle = (low + high) // 2
        later = _record_from(file, middle, counts)
        if later is not None and is_before(later):
            low = middle + 1
        else:
            high = middle
    return low


def _record_from(file: BinaryIO, place: int, counts: _Condition) -> Record | None:
    """The first record that counts of those that begin at byte ``place`` or behind it; None where there is none."""
    file.seek(max(0, place - 1))
    if place > 0:
        file.readline()
    for _ in range(_WITHOUT_TIME):
        if not (line := file.readline()):
            return None
        if (record := parse_record(line)) is not None and counts(record):
            return record
    return None
