"""Find out whether machines share a directory: one creates a file with a unique name, the others look for it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ds_gpt2.common import files

_MARK = ".node-"  # start of the names of the files
_POLL_SECONDS = 0.2


def mark(directories: Sequence[str], name: str) -> list[str]:
    """Create a file ``name`` in each directory, or in the nearest parent that exists; return where.

    Raises:
        OSError: a directory, which the error names, cannot be written; no file is left.
    """
    parents: list[str] = []
    for directory in directories:
        file = _file(directory, name)
        try:
            files.open_for_writing(file, "wb").close()
        except OSError as error:
            unmark(directories, name)
            raise OSError(error.errno, error.strerror, directory) from None
        parents.append(str(file.parent))
    return parents


def has_marks(directories: Sequence[str], names: Sequence[str], seconds: float = 5.0) -> list[list[str]]:
    """Return for each directory the ``names`` whose files are missing there.

    Args:
        seconds: to wait for them: a network file system may show new files late.
    """
    deadline = time.monotonic() + seconds
    while True:
        missing = [[name for name in names if not os.path.exists(f"{each}/{_MARK}{name}")] for each in directories]
        if not any(missing) or time.monotonic() > deadline:
            return missing
        time.sleep(_POLL_SECONDS)


def unmark(directories: Sequence[str], name: str) -> None:
    """Delete the files that ``mark`` has created for ``directories``."""
    for directory in directories:
        with contextlib.suppress(OSError):
            _file(directory, name).unlink(missing_ok=True)


def not_shared(directory: str, one: str, other: str) -> str:
    """Return that ``directory`` is not the same on two hosts, and the fix."""
    return (
        f"{directory} is not the same directory on {one} and {other}: mount a shared file system there, or set run.dir"
        " and checkpoint.dir to one"
    )


def _file(directory: str, name: str) -> Path:
    return files.nearest_existing(Path(directory)) / f"{_MARK}{name}"
