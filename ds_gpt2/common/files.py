"""Files that are written, appended to and deleted by their own names only, and regular files that are read.

A symbolic link at a name that is written may lead to any file of the user's: it is deleted, and what it leads to stays
as it is. A pipe or a device in the place of a file is not read: that could wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from ds_gpt2.common.errors import UserError

LARGEST = 256 << 20  # bytes of a file that is read as a whole
_NEWLINE = b"\n"
_PROBE, _PROBE_BYTES = ".write_probe", 160
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class NotDurableError(OSError):
    """All is written, but the medium has not confirmed it."""


def no_links(path: str, flags: int, mode: int = 0o666) -> int:
    """An opener, see ``open``: a symbolic link at ``path`` is replaced by a file, and a pipe does not block.

    Args:
        mode: permissions of a new file, see ``os.open``.

    Raises:
        OSError: it cannot be opened.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):  # EMLINK: FreeBSD's
            raise
    os.unlink(path)
    return os.open(path, flags, mode)


def regular_only(path: str, flags: int) -> int:
    """An opener, see ``open``, for reading: it follows links, and opens nothing but a regular file.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file
    os.close(file)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "Not a regular file", path)


def read_small(path: Path) -> bytes:
    """The content of a regular file of ``LARGEST`` bytes at most.

    Raises:
        OSError: it cannot be read, is something else, or larger.
    """
    with open(path, "rb", opener=regular_only) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, f"Larger than {LARGEST >> 20} MiB", str(path))
    return data


def open_for_writing(path: Path, mode: str, buffering: int = -1) -> BinaryIO:
    """Open a file for writing by its own name, see ``no_links``.

    Args:
        mode: of ``open``, binary.

    Raises:
        OSError: it cannot be opened.
    """
    return cast(BinaryIO, open(path, mode, buffering, opener=no_links))


def write_all(write: Callable[[memoryview], int | None], data: bytes | bytearray | memoryview) -> None:
    """Call ``write``, which may take less than it is given, until all of ``data`` is written.

    Raises:
        OSError: it is not.
    """
    left = memoryview(data).cast("B")
    while left:
        if not (written := write(left)):
            raise OSError(errno.EAGAIN, "Nothing was written")
        left = left[written:]


def append_lines(path: Path, content: bytes, durable: bool = False) -> None:
    """Append whole lines, in one write if the disk allows it: several processes may append to a file.

    If an earlier process left half a line, ``content`` begins a new one.

    Args:
        content: ends with a line end.
        durable: it is on the medium when this returns.

    Raises:
        NotDurableError: only the last part failed.
        OSError: not all of it is written.
    """
    file = no_links(str(path), os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) not in (_NEWLINE, b""):
            content = _NEWLINE + content
        write_all(functools.partial(os.write, file), content)
        if durable:
            try:
                os.fsync(file)
            except OSError as error:
                raise NotDurableError(*error.args) from None
    finally:
        os.close(file)


def write_problem(directory: Path) -> str | None:
    """Why files cannot be made in a directory, as on a full, read-only or missing disk; None if they can."""
    probe = directory / _PROBE
    try:
        with open(probe, "wb", buffering=0, opener=no_links) as file:
            return None if file.write(bytes(_PROBE_BYTES)) == _PROBE_BYTES else os.strerror(errno.ENOSPC)
    except OSError as error:
        return error.strerror or type(error).__name__
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def is_real_directory(path: Path) -> bool:
    """Whether ``path`` is a directory, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def remove_tree(path: Path) -> None:
    """Delete a directory with all in it, or a file; of a symbolic link, the link. Nothing there: nothing happens.

    Raises:
        OSError: something cannot be deleted.
    """
    if is_real_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes | BinaryIO, *, durable: bool = False, mode: int = 0o666) -> None:
    """Replace ``path``: a reader finds the old content or the new one.

    Args:
        content: text in UTF-8 (lone surrogates are escaped), bytes, or an open file to copy from where it stands.
        durable: after a power cut, too; the content is on the medium before it has this name.
        mode: the most permissions that the file may have.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed: it may have other permissions
        with open(partial, "wb", opener=functools.partial(no_links, mode=mode)) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                shutil.copyfileobj(content, file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


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


def check_can_write(directory: Path, full_is_allowed: bool = True) -> None:
    """As ``check_writable``, without a trace: what is not there yet is judged by the nearest parent that is.

    Args:
        full_is_allowed: older files there give way to new ones.

    Raises:
        UserError: ``directory`` cannot be written to or made.
    """
    _check_path(directory)
    existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    try:
        _probe(existing)
        if not full_is_allowed and (problem := write_problem(existing)) is not None:
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
        file = open_for_writing(path, "a+b")
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
