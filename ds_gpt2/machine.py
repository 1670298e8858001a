"""What this machine has to offer: ports, cores, directories, files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import tempfile
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.errors import UserError
from ds_gpt2.safe_files import no_links, open_own, write_problem

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


def free_port() -> int:
    """A port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_free(address: str, port: int) -> None:
    """
    Raises:
        UserError: ``port`` cannot be listened on, usually because another run does.
    """
    try:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"{address}, the address of rank 0, is not known here ({error.strerror}): check MASTER_ADDR"
        ) from None
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # behind a translated address, say: PyTorch listens on all of them
                return
            raise UserError(
                f"port {port} is in use, perhaps by another run: start with"
                f" `deepspeed --master_port {free_port()} ...`, or with ./launch.sh, which finds a free one"
            ) from None


def check_writable(directory: Path) -> None:
    """
    Raises:
        UserError: files cannot be made in ``directory`` (which is created).
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _probe(directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; check its permissions and its disk") from None


def check_may_write(directory: Path, full_is_fine: bool = True) -> None:
    """As ``check_writable``, without a trace: what is not there yet is judged by the nearest parent that is.

    Args:
        full_is_fine: older files there give way to new ones.

    Raises:
        UserError: ``directory`` cannot be written to or made.
    """
    _check_path(directory)
    existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    try:
        _probe(existing)
        if not full_is_fine and (problem := write_problem(existing)) is not None:
            raise UserError(f"cannot write to {directory}: {problem}; make room on its disk")
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {existing}: {error.strerror}; check its permissions and its disk"
        ) from None


def _probe(directory: Path) -> None:
    """Make and delete a directory in ``directory``. A full disk passes: a run makes room on it.

    Raises:
        OSError: that is not allowed, or does not work.
    """
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=directory))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _check_path(directory: Path) -> None:
    """Check that ``directory`` is a path that a file system accepts, whether or not it exists."""
    try:
        os.lstat(directory)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"cannot write to {str(directory)[:200]}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot write to {str(directory)[:200]!r}: a path has no null character") from None


def lock(path: Path, whose: str) -> BinaryIO:
    """Make this process the only one that holds ``path``, until the file returned is closed or the process ends.

    Args:
        whose: what is locked, for the message.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        file = open_own(path, "a+b")
        if not try_lock(file):
            file.seek(0)
            holder = file.read(100).decode(errors="replace").strip() or "unknown"
            raise UserError(f"{whose} is in use by process {holder}: wait for its end, or end it first") from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; check its permissions and its disk") from None
    return file


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file, until it is closed; False if another process has locked it.

    On a file system without locks there is none, and the answer is True.

    Raises:
        OSError: any other reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def sync_directory(path: Path) -> None:
    """The names in ``path`` are on the medium when this returns."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, text: str, mode: int = 0o666) -> None:
    """Replace ``file``: who reads it finds the old text or the new one. What a power cut leaves is not said.

    Args:
        mode: the most permissions that the file may have.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    partial = file.with_name(file.name + ".tmp")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed: it may have other permissions
        opener = functools.partial(no_links, mode=mode)
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", opener=opener) as opened:
            opened.write(text)
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
