"""A directory that is followed when somebody moves it while it is in use.

An open directory stays the same wherever its path leads later, and Linux tells where it is now. Paths that were
composed before the move lead nowhere, or into what was put there instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

_DELETED = " (deleted)"  # appended by Linux, see proc(5), /proc/pid/exe


class OpenDirectory:
    """Only what is seen counts: a path that cannot be looked at, as on a server that is away, has not moved."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: absolute; a directory that is not there yet is opened when it is.
        """
        self._path = path
        self._file: int | None = None
        self._open()

    @property
    def path(self) -> Path:
        """Where the directory is now; where it was if nothing shows that."""
        return self._moved_to() or self._path

    @property
    def is_deleted(self) -> bool:
        """Whether it has been deleted, as by a move to another file system."""
        return not self._leads_here(self._path) and not self._moved_to() and str(self._found()).endswith(_DELETED)

    @property
    def has_gone(self) -> bool:
        """Whether it has been moved or deleted."""
        return not self._leads_here(self._path) and (self._moved_to() is not None or self.is_deleted)

    def make_again(self) -> None:
        """Make a deleted directory anew, if its path is still on the same file system: the disk is not away.

        Raises:
            OSError: it is another file system, or the directory cannot be made.
        """
        assert self._file is not None
        existing = next(parent for parent in self._path.parents if parent.is_dir())
        if existing.stat().st_dev != os.fstat(self._file).st_dev:
            raise FileNotFoundError(errno.ENOENT, "deleted, and its path is on another file system", str(self._path))
        self._path.mkdir(parents=True, exist_ok=True)
        self._close()
        self._file = None
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            self._close = weakref.finalize(self, os.close, self._file)

    def _moved_to(self) -> Path | None:
        if self._leads_here(self._path) or not self._leads_here(found := self._found()):
            return None
        return found

    def _leads_here(self, path: Path) -> bool:
        if self._file is None:
            self._open()
        if self._file is None:
            return True  # nothing is known of it
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file))
        except OSError:
            return False

    def _found(self) -> Path:
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._file}"))
        except OSError:  # not Linux
            return self._path
