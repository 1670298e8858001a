"""What a person writes down about a run: ``NOTES.md`` in the run's directory, and the same in TensorBoard.

``NOTES.md`` is the record, and may be edited by hand. TensorBoard's copy is made from it, in an event file of its own,
so that the training process and its event file are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ds_gpt2.common import files, safe_json
from ds_gpt2.common.files import append_lines, no_links, read_small, regular_only
from ds_gpt2.run_dir import metrics

NOTES = "NOTES.md"
TAG = "notes"  # in TensorBoard

_TIME = "%Y-%m-%d %H:%M:%S %z"
_HEADING = re.compile(r"^## (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}), step (\d[\d,]*)$", re.MULTILINE)
_TAIL_BYTES = 1 << 20  # of metrics.jsonl; one record has a kilobyte or two, with samples some more


@dataclass(frozen=True)
class Note:
    time: str  # local, as 2026-01-31 17:45:00 +0100
    step: int
    text: str  # Markdown


def now(step: int, text: str) -> Note:
    return Note(datetime.now().astimezone().strftime(_TIME), step, text.strip())


def newest_step(run_dir: Path) -> int:
    """The last step in the run's metrics; 0 where there is none. Lines cut by a crash are skipped."""
    with contextlib.suppress(OSError), open(run_dir / metrics.METRICS, "rb", opener=regular_only) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(safe_json.parse(line)["step"])
    return 0


def read_notes(run_dir: Path) -> list[Note]:
    """In the order of the file; what stands before the first heading is not a note."""
    try:
        text = read_small(run_dir / NOTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    _, *parts = _HEADING.split(text)
    return [
        Note(written, int(step.replace(",", "")), body.strip())
        for written, step, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


@contextlib.contextmanager
def writer_lock(run_dir: Path) -> Iterator[None]:
    """Wait until no other process writes notes of this run; on a file system without locks, do not wait.

    Raises:
        OSError: ``NOTES.md`` can be neither opened nor made.
    """
    with open(run_dir / NOTES, "ab", opener=no_links) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def append(run_dir: Path, note: Note) -> None:
    """Add ``note`` to ``NOTES.md``; it is on the disk when this returns.

    One write at the file's end: notes of several processes never mix, lock or no lock.

    Raises:
        OSError: it could not be written.
    """
    entry = f"\n## {note.time}, step {note.step:,}\n\n{note.text}\n".encode()
    append_lines(run_dir / NOTES, entry, durable=True)
    files.sync_directory(run_dir)


def show_in_tensorboard(notes: list[Note], directory: Path) -> None:
    """Put all ``notes`` into one new event file in ``directory``; the files there before go.

    TensorBoard's fast reader keeps one text a step, and forgets what lies beyond a step that comes again. So notes at
    one step are one text, and all are written again in the order of their steps.
    """
    directory.mkdir(exist_ok=True)
    earlier = list(directory.glob("*tfevents*"))
    partial = directory / f".{os.getpid()}.tmp"
    partial.write_bytes(_events(notes))
    partial.replace(directory / f"events.out.tfevents.{time.time_ns():020d}.notes")
    for file in earlier:
        file.unlink(missing_ok=True)


def _events(notes: list[Note]) -> bytes:
    """The content of an event file: a record a step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    records = RecordWriter(content)
    records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    for step, group in itertools.groupby(sorted(notes, key=_step), key=_step):
        at_step = list(group)
        text = "\n\n".join(f"**{note.time}**\n\n{note.text}" for note in at_step)
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=TAG, metadata=create_summary_metadata(TAG, None), tensor=tensor)
        written = datetime.strptime(at_step[-1].time, _TIME).timestamp()
        records.write(Event(wall_time=written, step=step, summary=Summary(value=[value])).SerializeToString())
    return content.getvalue()


def _step(note: Note) -> int:
    return note.step
