"""Lock files. A lock file holds the process that has locked it last, as ``PID on HOST``; it stays after the unlock.

On some shared disks file locks do not work, or only within a machine. So the holder also renews a lease, see ``lease``:
the modification time of the lock file. A process that can lock a file which names another host does not know whether
the lock is free or only not visible here. It waits until it knows: the holder sets the modification time to 0 when it
releases the lock; a new time shows that the holder is running; a time that has not changed for ``LEASE_SECONDS`` shows
that the holder or its machine is lost. Of two machines that lock the file within the same second, both may succeed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import open_for_writing, regular_only
from ds_gpt2.common.formatting import duration
from ds_gpt2.common.lease import LEASE_SECONDS, RENEW_SECONDS, Renewal, file_time

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_SEPARATOR = " on "
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.02
_MAX_BYTES = 300  # of a lock file; a host name has at most 253 characters
_RELEASED = 0.0  # modification time
_POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


class Lock:
    """A lock that this process holds until ``close``, or until the process ends."""

    def __init__(self, file: BinaryIO, renew_seconds: float = RENEW_SECONDS) -> None:
        """Write this process into the locked file, and renew its lease from now on.

        Raises:
            OSError: the file cannot be written.
        """
        self._file = file
        self._content = f"{os.getpid()}{_SEPARATOR}{socket.gethostname()}\n".encode()
        self._using_file = threading.Lock()
        self._taken_by: str | None = None
        file.truncate(0)
        file.write(self._content)
        file.flush()
        self._renewal = Renewal(self._renew, renew_seconds)

    @property
    def taken_by(self) -> str | None:
        """The process on another host that has taken the lock because the lease had ended; None if none has."""
        return self._taken_by

    def close(self) -> None:
        """Release the lock."""
        self._renewal.close()
        with self._using_file:
            if self._taken_by is None and not self._file.closed:
                with contextlib.suppress(OSError):
                    os.utime(self._file.fileno(), (_RELEASED, _RELEASED))
            self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _renew(self) -> None:
        with self._using_file:
            if self._file.closed or self._taken_by is not None:
                return
            content = os.pread(self._file.fileno(), _MAX_BYTES, 0)
            if content and content != self._content:  # empty for a moment while another process writes
                self._taken_by = _as_text(content)
            else:
                os.utime(self._file.fileno())


def lock(path: Path, what: str) -> Lock:
    """Create and lock the file ``path``. The lock is held until the returned object is closed or the process ends.

    If it names a process of another host, wait up to a minute for the end of its lease, see above.

    Args:
        what: the locked object, for the message.

    Raises:
        UserError: another process holds the lock, or the file cannot be created.
    """
    try:
        file = open_for_writing(path, "a+b")
        try:
            if not _try_for_a_moment(file):
                file.seek(0)
                raise UserError(f"{what} is in use by process {_read(file)}: wait until it ends, or stop it first")
            _wait_for_other_host(path, what)
            return Lock(file)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; check its permissions and its disk") from None


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


@dataclass(frozen=True)
class _Lease:
    """The holder of a lock on another host."""

    holder: str
    renewed: float  # seconds since 1970, by the clock of the file system


def _wait_for_other_host(path: Path, what: str) -> None:
    """Wait until no process of another host holds the lock.

    Raises:
        UserError: one does.
    """
    found = _lease_of_other_host(path)
    if found is None:
        return
    age = file_time(path.parent) - found.renewed
    if age >= LEASE_SECONDS:
        return
    wait = min(LEASE_SECONDS, LEASE_SECONDS - age)
    log.warning(f"{what} was in use by process {found.holder}: waiting up to {duration(wait)} for a sign of it")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(min(_POLL_SECONDS, wait))
        lease = _lease_of_other_host(path)
        if lease is None:
            return
        if lease != found:
            raise UserError(f"{what} is in use by process {lease.holder}: wait until it ends, or stop it first")


def _lease_of_other_host(path: Path) -> _Lease | None:
    """Return the lease of the process that has locked ``path`` last; None if it is of this host, or released."""
    with open(path, "rb", opener=regular_only) as file:  # opened each time: only then a client asks its file server
        holder, renewed = _read(file), os.fstat(file.fileno()).st_mtime
    host = holder.partition(_SEPARATOR)[2]
    return None if host in ("", socket.gethostname()) or renewed == _RELEASED else _Lease(holder, renewed)


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
    return _as_text(file.read(_MAX_BYTES))


def _as_text(content: bytes) -> str:
    return content.decode(errors="replace").strip() or "unknown"
