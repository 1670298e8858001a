"""The records in a run's directory.

``metrics.jsonl`` has one JSON object a step, from the first step to the last, whatever happened in between;
``starts.jsonl`` has one for every start, ``metrics_replaced.jsonl`` those of steps that were trained again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import append_lines, open_for_writing, read_small, regular_only, replace_file, write_all
from ds_gpt2.common.open_directory import OpenDirectory

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
REPLACED = "metrics_replaced.jsonl"  # records of steps that were trained again
UNWRITTEN = "metrics_unwritten.jsonl"  # with the checkpoints: records that wait for the full disk of METRICS
TIME = "%Y-%m-%dT%H:%M:%S%z"


log = logging.getLogger(__name__)

Record = dict[str, Any]


class MetricsFile:
    """Appends to ``metrics.jsonl``, wherever the run is moved. What could not be written waits for the next flush."""

    def __init__(self, file: Path, reserve: Callable[[], Path] | None = None, step: int = 0) -> None:
        """
        Args:
            reserve: returns where to write what waits at a durable flush while ``file`` cannot be written.
            step: the one that training resumes from; of what an earlier process left in the reserve, the records up
                to it are written first.
        """
        self._name = file.name
        self._directory = OpenDirectory(file.parent)
        self._reserve = reserve
        self._open = open_for_writing(file, "a+b", buffering=0)
        self._waiting = bytearray()
        self._not_durable = bytearray()  # written since the last durable flush
        self._reserved: int | None = None  # bytes of what waits that the reserve has too; None: there is no such file
        if reserve is not None and reserve().exists():
            self._waiting += _unwritten(file, reserve(), step)
            self._reserved = len(self._waiting)

    @property
    def file(self) -> Path:
        """Where the file is now."""
        return self._directory.path / self._name

    @property
    def unsaved(self) -> int:
        """Records that are in memory alone."""
        return self._waiting[self._reserved or 0 :].count(b"\n")

    def append(self, record: Record) -> None:
        self._waiting += _line(record)

    def flush(self, durable: bool = False) -> None:
        """
        Args:
            durable: the records are on the medium when this returns; if they cannot be written, on the reserve's.

        Raises:
            OSError: not all of it is written; the file ends with a whole line, and the rest waits.
        """
        try:
            self._write(durable)
        except OSError:
            if durable and self._reserve is not None and (self._not_durable or self._waiting):
                self._write_reserve(self._reserve())
            raise
        if durable and self._reserved is not None and self._reserve is not None:
            self._reserve().unlink(missing_ok=True)
            self._reserved = None

    def close(self) -> None:
        self._open.close()

    def _write(self, durable: bool) -> None:
        self._restore_deleted()
        before = self._open.seek(0, os.SEEK_END)
        try:
            write_all(self._open.write, bytes(self._waiting))
            if durable:
                os.fsync(self._open.fileno())  # where a server reports that its disk is full
        except OSError:
            with contextlib.suppress(OSError):
                self._open.truncate(before)
            raise
        self._not_durable += self._waiting
        self._waiting.clear()
        self._reserved = None if self._reserved is None else 0
        if durable:
            self._not_durable.clear()

    def _restore_deleted(self) -> None:
        """If the file was deleted or replaced while it is open: write it again, or append to what is there now."""
        file = self.file
        try:
            found = os.stat(file, follow_symlinks=False)
        except FileNotFoundError:
            if not file.parent.is_dir():  # a run that was deleted: it is not made again
                return
            self._open.seek(0)
            replace_file(file, self._open, durable=True)
        else:
            if os.path.samestat(found, os.fstat(self._open.fileno())):
                return
        written = open_for_writing(file, "a+b", buffering=0)
        log.warning(f"{file} was deleted or replaced while the run trains: its records are appended to the new file")
        self._open.close()
        self._open = written

    def _write_reserve(self, reserve: Path) -> None:
        """What is not known to be on the medium, to another disk: a crash does not lose it."""
        replace_file(reserve, bytes(self._not_durable + self._waiting), durable=True)
        if self._reserved is None:
            log.warning(f"records are kept in {reserve} until {self.file} can be written")
        self._reserved = len(self._waiting)


def _unwritten(file: Path, reserve: Path, step: int) -> bytes:
    """The lines in ``reserve`` that continue ``file``, up to ``step``."""
    last = max((record["step"] for record in read_metrics(file)), default=0)
    return b"".join(_line(record) for record in read_metrics(reserve) if last < record["step"] <= step)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def read_metrics(file: Path) -> Iterator[Record]:
    """The records in ``file``, each with its ``step``; none if there is no file. Lines cut by a crash are left out."""
    if not file.exists():
        return
    with open(file, encoding="utf-8", errors="replace", opener=regular_only) as lines:
        for line in lines:
            if (record := parse_record(line)) is not None:
                yield record


def drop_after(file: Path, step: int, reserve: Path | None = None) -> None:
    """Move what was recorded beyond ``step`` to ``REPLACED``: it is replayed, and curves must not overlap.

    A crash in between moves some of it twice. Damaged lines after the last record that stays are deleted.

    Args:
        reserve: see ``MetricsFile``. What it has beyond ``step`` is moved too; its directory takes what does not fit
            on the full disk of ``file``.

    Raises:
        OSError: the records cannot be moved.
    """
    moved = b""
    if reserve is not None and reserve.exists():
        moved = b"".join(_line(record) for record in read_metrics(reserve) if record["step"] > step)
    if file.is_symlink() and file.exists():
        with open(file, "rb", opener=regular_only) as source:
            replace_file(file, source, durable=True)  # only the run's own file is shortened
    found = _split(file, step) if file.exists() else None
    if found is not None:
        moved = found.moved + moved
    if moved:
        _append_to_any([file.parent, *([reserve.parent] if reserve is not None else [])], REPLACED, moved)
    if found is not None and (found.rest or found.end < file.stat().st_size):
        with open_for_writing(file, "r+b") as opened:
            opened.truncate(found.end)
            opened.seek(found.end)
            opened.write(found.rest)
            opened.flush()
            os.fsync(opened.fileno())


class _Split(NamedTuple):
    end: int  # bytes up to which a file stays as it is
    rest: bytes  # that follow there: a missing line end, and records up to the step that stood among later ones
    moved: bytes  # records beyond the step


def _split(file: Path, step: int) -> _Split:
    end, offset, rest, moved = 0, 0, bytearray(), bytearray()
    with open(file, "rb", opener=regular_only) as lines:
        for line in lines:
            offset += len(line)
            if (record := parse_record(line)) is None:
                continue
            missing = b"" if line.endswith(b"\n") else b"\n"  # as an editor may leave it
            if record["step"] > step:
                moved += line + missing
            elif rest or moved:
                rest += line + missing
            else:
                end, rest = offset, bytearray(missing)
    return _Split(end, bytes(rest), bytes(moved))


def _append_to_any(directories: Sequence[Path], name: str, content: bytes) -> None:
    """Append to the file in the first directory that takes it.

    Raises:
        OSError: none does.
    """
    for directory in directories:
        try:
            append_lines(directory / name, content, durable=True)
            return
        except OSError:
            if directory == directories[-1]:
                raise


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


def parse_record(line: str | bytes) -> Record | None:
    """A record with its ``step``, and with its ``time`` if that is one; None of a damaged line."""
    try:
        record = safe_json.parse(line)
        if not isinstance(record["step"], int):
            return None
        if "time" in record and not safe_json.is_time(record["time"]):
            del record["time"]
        return cast(Record, record)
    except (ValueError, KeyError, TypeError):
        return None
