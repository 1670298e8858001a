"""Read, write and replace files safely, and check that directories are writable.

Files are never written through a symbolic link, which may refer to any file of the user: the link is replaced and its
target is unchanged. Only regular files are read: reading a pipe or a device could block forever.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from ds_gpt2.common.errors import UserError

LARGEST = 256 << 20  # bytes of a file that is read as a whole
_NEWLINE = b"\n"
_PROBE, _PROBE_BYTES = ".write_probe", 160
_TEMPORARY, _TOKEN_BYTES = ".tmp", 4  # suffix of temporary files, and the random part of their names
_MAX_PREFIX = 50  # characters of the file's name in that of its temporary file: a name has at most 255 bytes
_ABANDONED_SECONDS = 3600.0  # a temporary file that was not written to for so long is of a killed process


class NotDurableError(OSError):
    """All data is written, but it may not be durable: the sync failed."""


def no_links(path: str, flags: int, mode: int = 0o666) -> int:
    """Open a file; an ``opener`` for ``open``. A symbolic link is replaced by a file; a pipe does not block.

    Args:
        mode: permissions of a new file, see ``os.open``.

    Returns:
        The file descriptor.

    Raises:
        OSError: the file cannot be opened.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):  # EMLINK on FreeBSD
            raise
    os.unlink(path)
    return os.open(path, flags, mode)


def regular_only(path: str, flags: int) -> int:
    """Open a regular file for reading; an ``opener`` for ``open``. Symbolic links are followed.

    Returns:
        The file descriptor.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
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
    """Return the content of a regular file.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than ``LARGEST`` bytes.
    """
    with open(path, "rb", opener=regular_only) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, f"Larger than {LARGEST >> 20} MiB", str(path))
    return data


def sha256(path: Path) -> str:
    """Return the hex digest of a whole file.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", opener=regular_only) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_for_writing(path: Path, mode: str, buffering: int = -1) -> BinaryIO:
    """Open a file for writing without following a symbolic link, see ``no_links``.

    Args:
        mode: a binary mode of ``open``.

    Raises:
        OSError: the file cannot be opened.
    """
    return cast(BinaryIO, open(path, mode, buffering, opener=no_links))


def write_all(write: Callable[[memoryview], int | None], data: bytes | bytearray | memoryview) -> None:
    """Call ``write``, which may write only a part, until all of ``data`` is written.

    Raises:
        OSError: not all of ``data`` could be written.
    """
    left = memoryview(data).cast("B")
    while left:
        if not (written := write(left)):
            raise OSError(errno.EAGAIN, "Nothing was written")
        left = left[written:]


def append_lines(path: Path, content: bytes, durable: bool = False) -> None:
    """Append complete lines, in a single write if possible: several processes may append to the same file.

    If an earlier process left an incomplete last line, a line end is inserted first.

    Args:
        content: one or more lines, each with its line end.
        durable: sync the file before returning.

    Raises:
        NotDurableError: the content is written, but the sync failed.
        OSError: not all of the content is written.
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
    """Return why no file can be created in ``directory`` (full or read-only disk, ...); None if one can."""
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
    """Return whether ``path`` is a directory and not a symbolic link to one."""
    return path.is_dir() and not path.is_symlink()


def remove_tree(path: Path) -> None:
    """Delete a directory and its content, a file, or a symbolic link (not its target), if it exists.

    Raises:
        OSError: a file or directory cannot be deleted.
    """
    if is_real_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(
    path: Path,
    content: str | bytes | BinaryIO,
    *,
    durable: bool = False,
    mode: int = 0o666,
    hidden: bool = False,
) -> None:
    """Replace the file ``path`` atomically: a reader sees either the old or the new content.

    The new content is written to a temporary file in the same directory. Several processes, also on several machines,
    may replace the same file: each has a temporary file of its own, and the last to finish wins.

    Args:
        content: text, written as UTF-8 with lone surrogates escaped; bytes; or an open file, copied from its position.
        durable: sync the content before the rename, so that the replacement is atomic also at a power failure.
        mode: permissions of the file, restricted by the umask.
        hidden: give the temporary file a hidden name that does not contain the name of ``path``.

    Raises:
        OSError: the new content cannot be written; the old content is unchanged.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    prefix = "." if hidden else f"{path.name[:_MAX_PREFIX]}."
    _delete_abandoned(path.parent, prefix)
    partial = path.with_name(f"{prefix}{secrets.token_hex(_TOKEN_BYTES)}{_TEMPORARY}")
    file = open(partial, "xb", opener=functools.partial(no_links, mode=mode))  # noqa: SIM115  # closed by _write
    try:
        _write(file, content, durable)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _write(file: BinaryIO, content: bytes | BinaryIO, durable: bool) -> None:
    """Write ``content`` to ``file`` and close it."""
    with file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            shutil.copyfileobj(content, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _delete_abandoned(directory: Path, prefix: str) -> None:
    """Delete temporary files of ``replace_file`` that killed processes have left; a file in use is younger."""
    name = re.compile(rf"{re.escape(prefix)}[0-9a-f]{{{2 * _TOKEN_BYTES}}}{re.escape(_TEMPORARY)}")
    oldest = time.time() - _ABANDONED_SECONDS
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                os.unlink(entry.path)


def check_writable(directory: Path) -> None:
    """Create ``directory`` and check that it is writable.

    Raises:
        UserError: it cannot be created, or is not writable.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _probe(directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; check its permissions and its disk") from None


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or its nearest parent that exists, which may be a file."""
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def check_can_write(directory: Path, full_is_allowed: bool = True) -> None:
    """Check that ``directory`` is writable, without creating it. If it does not exist, its nearest parent is checked.

    Args:
        full_is_allowed: a full disk passes, because old files will be deleted.

    Raises:
        UserError: ``directory`` is not writable or cannot be created.
    """
    _check_path(directory)
    existing = nearest_existing(directory)
    try:
        _probe(existing)
        if not full_is_allowed and (problem := write_problem(existing)) is not None:
            raise UserError(f"cannot write to {directory}: {problem}; free some space on its disk")
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {existing}: {error.strerror}; check its permissions and its disk"
        ) from None


def _probe(directory: Path) -> None:
    """Create and delete a subdirectory of ``directory``. A full disk passes: a run deletes old checkpoints.

    Raises:
        OSError: this is not permitted, or fails.
    """
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=directory))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _check_path(directory: Path) -> None:
    """Check that ``directory`` is a valid path, whether or not it exists. Raises UserError."""
    try:
        os.lstat(directory)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"cannot write to {str(directory)[:200]}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot write to {str(directory)[:200]!r}: a path cannot contain a null character") from None


def sync_directory(path: Path) -> None:
    """Make the names in directory ``path`` durable.

    Raises:
        OSError: the directory cannot be opened or synced.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
