"""The records of metrics in a run's directory, one JSON object per line.

``metrics.jsonl`` has one record per step, in the order of the steps, also after restarts and rollbacks;
``metrics_replaced.jsonl`` has the old records of steps that were trained again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import append_lines, open_for_writing, regular_only, replace_file, write_all
from ds_gpt2.common.open_directory import OpenDirectory

METRICS = "metrics.jsonl"
REPLACED = "metrics_replaced.jsonl"  # records of steps that were trained again
UNWRITTEN = "metrics_unwritten.jsonl"  # beside the checkpoints: records while the disk of METRICS is full

log = logging.getLogger(__name__)

Record = dict[str, Any]


class MetricsFile:
    """Appends to ``metrics.jsonl``, also after the run is moved. If a write fails, the records wait for the next flush.

    If the disk is full, a durable flush writes them to a second file, the fallback file, on another disk.
    """

    def __init__(self, file: Path, fallback_file: Callable[[], Path] | None = None, step: int = 0) -> None:
        """Open ``file`` for appending.

        Args:
            fallback_file: a function that returns the path of the fallback file; None: there is none.
            step: the step that training resumes from. Records up to it that an earlier process has left in the fallback
                file are written first.

        Raises:
            OSError: the file cannot be opened.
        """
        self._name = file.name
        self._directory = OpenDirectory(file.parent)
        self._fallback_file = fallback_file
        self._open = open_for_writing(file, "a+b", buffering=0)
        self._waiting = bytearray()
        self._not_durable = bytearray()  # written since the last durable flush
        self._fallback_bytes: int | None = (
            None  # bytes of ``_waiting`` that are in the fallback file; None: there is none
        )
        if fallback_file is not None and fallback_file().exists():
            self._waiting += _unwritten(file, fallback_file(), step)
            self._fallback_bytes = len(self._waiting)

    @property
    def file(self) -> Path:
        """The current path of the file."""
        return self._directory.path / self._name

    @property
    def unsaved(self) -> int:
        """The number of records that are only in memory."""
        return self._waiting[self._fallback_bytes or 0 :].count(b"\n")

    def append(self, record: Record) -> None:
        """Add a record to those to be written by the next flush."""
        self._waiting += _line(record)

    def flush(self, durable: bool = False) -> None:
        """Write the waiting records.

        Args:
            durable: sync the file; if it cannot be written, write the records to the fallback file and sync that.

        Raises:
            OSError: not all records are written to the file. It ends with a complete line; the others wait.
        """
        try:
            self._write(durable)
        except OSError:
            if durable and self._fallback_file is not None and (self._not_durable or self._waiting):
                self._write_fallback_file(self._fallback_file())
            raise
        if durable and self._fallback_bytes is not None and self._fallback_file is not None:
            self._fallback_file().unlink(missing_ok=True)
            self._fallback_bytes = None

    def close(self) -> None:
        """Close the file without a flush."""
        self._open.close()

    def _write(self, durable: bool) -> None:
        self._restore_deleted()
        before = self._open.seek(0, os.SEEK_END)
        try:
            write_all(self._open.write, bytes(self._waiting))
            if durable:
                os.fsync(self._open.fileno())  # network file systems report a full disk only here
        except OSError:
            with contextlib.suppress(OSError):
                self._open.truncate(before)
            raise
        self._not_durable += self._waiting
        self._waiting.clear()
        self._fallback_bytes = None if self._fallback_bytes is None else 0
        if durable:
            self._not_durable.clear()

    def _restore_deleted(self) -> None:
        """Restore the file if it was deleted while it is open; if it was replaced, append to the new file."""
        file = self.file
        try:
            found = os.stat(file, follow_symlinks=False)
        except FileNotFoundError:
            if not file.parent.is_dir():  # the run was deleted: it is not recreated
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

    def _write_fallback_file(self, fallback_file: Path) -> None:
        """Write the records that are not durable to the fallback file, so that a crash does not lose them."""
        replace_file(fallback_file, bytes(self._not_durable + self._waiting), durable=True)
        if self._fallback_bytes is None:
            log.warning(f"records are written to {fallback_file} until {self.file} is writable")
        self._fallback_bytes = len(self._waiting)


def _unwritten(file: Path, fallback_file: Path, step: int) -> bytes:
    """Return the lines in ``fallback_file`` that follow the last step of ``file``, up to ``step``."""
    last = max((record["step"] for record in read_metrics(file)), default=0)
    return b"".join(_line(record) for record in read_metrics(fallback_file) if last < record["step"] <= step)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def read_metrics(file: Path) -> Iterator[Record]:
    """Yield the records in ``file``, each with its ``step``, without damaged lines; none if there is no file."""
    if not file.exists():
        return
    with open(file, encoding="utf-8", errors="replace", opener=regular_only) as lines:
        for line in lines:
            if (record := parse_record(line)) is not None:
                yield record


def drop_after(file: Path, step: int, fallback_file: Path | None = None) -> None:
    """Move the records after ``step`` to ``REPLACED``: these steps are trained again, and curves must not overlap.

    A crash during the move may duplicate records in ``REPLACED``. Damaged lines after the last remaining record are
    deleted.

    Args:
        fallback_file: see ``MetricsFile``. Its records after ``step`` are moved too. If the disk of ``file`` is full,
            the records are moved to the directory of ``fallback_file``.

    Raises:
        OSError: the records cannot be moved.
    """
    moved = b""
    if fallback_file is not None and fallback_file.exists():
        moved = b"".join(_line(record) for record in read_metrics(fallback_file) if record["step"] > step)
    if file.is_symlink() and file.exists():
        with open(file, "rb", opener=regular_only) as source:
            replace_file(file, source, durable=True)  # the target of the link is not truncated
    found = _split(file, step) if file.exists() else None
    if found is not None:
        moved = found.moved + moved
    if moved:
        _append_to_any([file.parent, *([fallback_file.parent] if fallback_file is not None else [])], REPLACED, moved)
    if found is not None and (found.rest or found.end < file.stat().st_size):
        with open_for_writing(file, "r+b") as opened:
            opened.truncate(found.end)
            opened.seek(found.end)
            opened.write(found.rest)
            opened.flush()
            os.fsync(opened.fileno())


class _Split(NamedTuple):
    """The parts of a metrics file that is cut after a step."""

    end: int  # the file is unchanged up to this byte
    rest: bytes  # to write there: a missing line end, and records up to the step that followed later ones
    moved: bytes  # records after the step


def _split(file: Path, step: int) -> _Split:
    end, offset, rest, moved = 0, 0, bytearray(), bytearray()
    with open(file, "rb", opener=regular_only) as lines:
        for line in lines:
            offset += len(line)
            if (record := parse_record(line)) is None:
                continue
            missing = b"" if line.endswith(b"\n") else b"\n"  # an editor may have removed it
            if record["step"] > step:
                moved += line + missing
            elif rest or moved:
                rest += line + missing
            else:
                end, rest = offset, bytearray(missing)
    return _Split(end, bytes(rest), bytes(moved))


def _append_to_any(directories: Sequence[Path], name: str, content: bytes) -> None:
    """Append ``content`` to file ``name`` in the first directory where this succeeds.

    Raises:
        OSError: it fails in all directories.
    """
    for directory in directories:
        try:
            append_lines(directory / name, content, durable=True)
            return
        except OSError:
            if directory == directories[-1]:
                raise


def parse_record(line: str | bytes) -> Record | None:
    """Return the record in a line; None if the line is damaged or has no step. An invalid ``time`` is removed."""
    record = safe_json.parse_object(line)
    if record is None or not isinstance(record.get("step"), int):
        return None
    if "time" in record and not safe_json.is_time(record["time"]):
        del record["time"]
    return record
