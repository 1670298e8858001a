"""Lock files. A lock file holds the process that has locked it last, as ``PID on HOST``; it stays after the unlock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import open_for_writing, regular_only

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_SEPARATOR = " on "
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.02
_MAX_BYTES = 300  # of a lock file; a host name has at most 253 characters


def lock(path: Path, what: str) -> BinaryIO:
    """Create and lock the file ``path``. The lock is held until the returned file is closed or the process ends.

    Args:
        what: the locked object, for the message.

    Raises:
        UserError: another process holds the lock, or the file cannot be created.
    """
    try:
        file = open_for_writing(path, "a+b")
        if not _try_for_a_moment(file):
            file.seek(0)
            raise UserError(f"{what} is in use by process {_read(file)}: wait until it ends, or stop it first")
        file.truncate(0)
        file.write(f"{os.getpid()}{_SEPARATOR}{socket.gethostname()}\n".encode())
        file.flush()
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; check its permissions and its disk") from None
    return file


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed. Return False if another process has locked it.

    On a file system without locks, return True without a lock.

    Raises:
        OSError: another error.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _try_for_a_moment(file: BinaryIO) -> bool:
    """Lock as ``try_lock`` does, and try again: ``holder_of`` in another process locks the file while it looks."""
    for _ in range(_ATTEMPTS - 1):
        if try_lock(file):
            return True
        time.sleep(_PAUSE_SECONDS)
    return try_lock(file)


def wait_for_lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed, after waiting for other processes. If locking fails, continue without."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def holder_of(path: Path) -> str | None:
    """Return the process that holds the lock ``path``, as ``PID on HOST``. Nothing is written.

    None if the lock is free, there is no lock file, or the file system has no locks.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(file)
    except OSError:
        return None
    return None


def last_host(path: Path) -> str | None:
    """Return the host of the process that has locked ``path`` last, locked or not; None if it is not recorded."""
    try:
        with open(path, "rb", opener=regular_only) as file:
            return _read(file).partition(_SEPARATOR)[2] or None
    except OSError:
        return None


def _read(file: BinaryIO) -> str:
    return file.read(_MAX_BYTES).decode(errors="replace").strip() or "unknown"
