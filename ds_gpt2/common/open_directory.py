"""A directory that can be moved while it is in use.

An open file descriptor refers to the same directory after a move, and Linux provides its current path. Paths composed
before the move no longer exist, or refer to another directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

_DELETED = " (deleted)"  # appended by Linux, see proc(5), /proc/pid/exe


class OpenDirectory:
    """A directory and its current path. It counts as moved or deleted only if that is certain: a server may be down."""

    def __init__(self, path: Path) -> None:
        """Open the directory, if it exists.

        Args:
            path: absolute; a directory that does not exist yet is opened later, when it exists.
        """
        self.opened_as = path
        self._file: int | None = None
        self.open()

    def open(self) -> None:
        """Open the directory if it exists; from now on moves are detected."""
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = os.open(self.opened_as, os.O_RDONLY | os.O_DIRECTORY)
                self._close = weakref.finalize(self, os.close, self._file)
                self._real_path = self._current_path()

    @property
    def path(self) -> Path:
        """The current path of the directory; the original path if the current one is unknown."""
        return self._moved_to() or self.opened_as

    @property
    def is_moved(self) -> bool:
        """Whether the directory now has another path."""
        return self._moved_to() is not None

    @property
    def is_deleted(self) -> bool:
        """Whether it was deleted (also by a move to another file system) and nothing exists at its path."""
        return (
            not self._is_at(self.opened_as)
            and str(self._current_path()).endswith(_DELETED)
            and _is_missing(self.opened_as)
        )

    def is_replaced(self, *markers: str) -> bool:
        """Return whether another directory is at its path, such as the mount point of an unmounted disk.

        Args:
            markers: names of files. A directory that has one of them is a copy, and is used instead of the original.
        """
        if self._is_at(self.opened_as) or self.is_moved or str(self._current_path()).endswith(_DELETED):
            return False
        return os.path.isdir(self.opened_as) and not any(os.path.exists(self.opened_as / marker) for marker in markers)

    def recreate(self) -> None:
        """Create a deleted directory again at its original path.

        Raises:
            OSError: the path is on another file system (as below an unmounted disk), or it cannot be created.
        """
        assert self._file is not None
        existing = next(parent for parent in self.opened_as.parents if parent.is_dir())
        if existing.stat().st_dev != os.fstat(self._file).st_dev:
            raise FileNotFoundError(
                errno.ENOENT, "deleted, and its path is on another file system", str(self.opened_as)
            )
        self.opened_as.mkdir(parents=True, exist_ok=True)
        self._close()
        self._file = None
        self.open()

    def _moved_to(self) -> Path | None:
        if self._is_at(self.opened_as) or (current := self._current_path()) == self._real_path:  # a changed link
            return None
        return current if self._is_at(current) else None

    def _is_at(self, path: Path) -> bool:
        self.open()
        if self._file is None:
            return True  # unknown
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file))
        except OSError:
            return False

    def _current_path(self) -> Path:
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._file}"))
        except OSError:  # no /proc: not on Linux
            return self.opened_as


def _is_missing(path: Path) -> bool:
    """Return whether nothing exists at ``path``; False if that is unknown, such as for a stale file handle."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
