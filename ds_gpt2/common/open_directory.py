"""A directory that is followed when it is moved while it is in use.

An open descriptor refers to the same directory after a move, and Linux tells its path. Paths that were composed before
the move do not exist any more, or belong to what was put there instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

_DELETED = " (deleted)"  # appended by Linux, see proc(5), /proc/pid/exe


class OpenDirectory:
    """A directory counts as moved or deleted only if that is certain: a server may be away for a while."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: absolute; a directory that does not exist yet is opened when it does.
        """
        self.opened_as = path
        self._file: int | None = None
        self.open()

    def open(self) -> None:
        """Open the directory if it exists by now; it is followed from here on."""
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = os.open(self.opened_as, os.O_RDONLY | os.O_DIRECTORY)
                self._close = weakref.finalize(self, os.close, self._file)
                self._was = self._now()

    @property
    def path(self) -> Path:
        """Where the directory is now; where it was if that is not known."""
        return self._moved_to() or self.opened_as

    @property
    def is_moved(self) -> bool:
        return self._moved_to() is not None

    @property
    def is_deleted(self) -> bool:
        """Whether it was deleted, as by a move to another file system, and nothing is at its path."""
        return (
            not self._leads_here(self.opened_as) and str(self._now()).endswith(_DELETED) and not self.opened_as.exists()
        )

    def is_replaced(self, *markers: str) -> bool:
        """Whether another directory is at its path: what a disk was mounted on shows when it is unmounted.

        Args:
            markers: names of files; a directory that has one is a copy, to be used in place of the original.
        """
        if self._leads_here(self.opened_as) or self.is_moved or str(self._now()).endswith(_DELETED):
            return False
        return self.opened_as.is_dir() and not any((self.opened_as / marker).exists() for marker in markers)

    def make_again(self) -> None:
        """Make a deleted directory again, if its path is still on the same file system and not below an unused mount.

        Raises:
            OSError: it is another file system, or the directory cannot be made.
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
        if self._leads_here(self.opened_as) or (now := self._now()) == self._was:  # as where a link was changed
            return None
        return now if self._leads_here(now) else None

    def _leads_here(self, path: Path) -> bool:
        self.open()
        if self._file is None:
            return True  # nothing is known of it
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file))
        except OSError:
            return False

    def _now(self) -> Path:
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._file}"))
        except OSError:  # not Linux
            return self.opened_as
