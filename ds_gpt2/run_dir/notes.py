"""The user's notes about a run: ``NOTES.md`` in the run's directory, which may be edited by hand."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ds_gpt2.common import files
from ds_gpt2.common.files import append_lines, no_links, read_small
from ds_gpt2.common.locks import wait_for_lock
from ds_gpt2.run_dir import metrics_tail

NOTES = "NOTES.md"

TIME = "%Y-%m-%d %H:%M:%S %z"
_HEADING = re.compile(r"^## (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}), step (\d[\d,]*)$", re.MULTILINE)


@dataclass(frozen=True)
class Note:
    """A note about a run."""

    time: str  # local, as 2026-01-31 17:45:00 +0100
    step: int
    text: str  # Markdown


def now(step: int, text: str) -> Note:
    """Return a note with the current time."""
    return Note(datetime.now().astimezone().strftime(TIME), step, text.strip())


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
