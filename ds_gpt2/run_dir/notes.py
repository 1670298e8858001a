"""The user's notes about a run: ``NOTES.md`` in the run's directory, and a copy in TensorBoard.

``NOTES.md`` is authoritative and may be edited by hand. The copy is written to a separate event file, so that the event
file of the training process is unchanged.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ds_gpt2.common import files
from ds_gpt2.common.files import append_lines, no_links, read_small
from ds_gpt2.common.locks import wait_for_lock
from ds_gpt2.run_dir import metrics_tail

NOTES = "NOTES.md"
TAG = "notes"  # in TensorBoard

_TIME = "%Y-%m-%d %H:%M:%S %z"
_HEADING = re.compile(r"^## (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}), step (\d[\d,]*)$", re.MULTILINE)


@dataclass(frozen=True)
class Note:
    """A note about a run."""

    time: str  # local, as 2026-01-31 17:45:00 +0100
    step: int
    text: str  # Markdown


def now(step: int, text: str) -> Note:
    """Return a note with the current time."""
    return Note(datetime.now().astimezone().strftime(_TIME), step, text.strip())


def newest_step(run_dir: Path) -> int:
    """Return the last step in the run's metrics; 0 if there is none. Damaged lines are skipped."""
    with contextlib.suppress(OSError):
        for record in metrics_tail.newest(run_dir, 1):
            return int(record["step"])
    return 0


def read_notes(run_dir: Path) -> list[Note]:
    """Return the notes in ``NOTES.md``, in the order of the file. Text before the first heading is ignored.

    Raises:
        OSError: the file exists, but cannot be read.
    """
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
    """Hold a lock on the notes of this run, after waiting for other processes. Without file locks, do not wait.

    Raises:
        OSError: ``NOTES.md`` cannot be opened or created.
    """
    with open(run_dir / NOTES, "ab", opener=no_links) as file:
        wait_for_lock(file)
        yield


def append(run_dir: Path, note: Note) -> None:
    """Append ``note`` to ``NOTES.md`` and sync the file.

    It is a single write at the end of the file: notes of several processes are never mixed, with or without a lock.

    Raises:
        OSError: the note cannot be written.
    """
    entry = f"\n## {note.time}, step {note.step:,}\n\n{note.text}\n".encode()
    append_lines(run_dir / NOTES, entry, durable=True)
    files.sync_directory(run_dir)


def show_in_tensorboard(notes: list[Note], directory: Path) -> None:
    """Write all ``notes`` to a new event file in ``directory`` and delete the earlier event files there.

    TensorBoard's fast data loader retains one text per step, and discards later steps if a step decreases. So the notes
    of a step are joined to one text, and all notes are written again in the order of their steps.

    Raises:
        OSError: the file cannot be written.
    """
    directory.mkdir(exist_ok=True)
    earlier = list(directory.glob("*tfevents*"))
    file = directory / f"events.out.tfevents.{time.time_ns():020d}.notes"
    hidden = directory / f".{os.getpid()}.tmp"  # TensorBoard reads every file with "tfevents" in its name
    files.replace_file(file, _events(notes), temporary=hidden)
    for old in earlier:
        old.unlink(missing_ok=True)


def _events(notes: list[Note]) -> bytes:
    """Return the content of an event file with one record per step."""
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
