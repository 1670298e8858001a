"""Files that are written, appended to and deleted by their own names only, and regular files that are read.

A symbolic link at a name that is written may lead to any file of the user's: it is deleted, and what it leads to stays
as it is. A pipe or a device in the place of a file is not read: that could wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

LARGEST = 256 << 20  # bytes of a file that is read as a whole
_NEWLINE = b"\n"
_PROBE, _PROBE_BYTES = ".write_probe", 160


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


def open_own(path: Path, mode: str, buffering: int = -1) -> BinaryIO:
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


def is_own_directory(path: Path) -> bool:
    """Whether ``path`` is a directory, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def remove_tree(path: Path) -> None:
    """Delete a directory with all in it, or a file; of a symbolic link, the link. Nothing there: nothing happens.

    Raises:
        OSError: something cannot be deleted.
    """
    if is_own_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
