"""The file operations of the commit protocol.

Each operation is a method of ``Disk``, so that tests can record them, inject failures into any of them, and simulate
power failures.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.common import files
from ds_gpt2.common.files import open_for_writing, write_all


class Disk:
    """The real file system. All methods raise OSError.

    A power failure may undo any operation until ``sync`` (content) or ``sync_directory`` (names) has returned.
    """

    def create(self, path: Path) -> BinaryIO:
        """Open a new unbuffered file for writing; an existing file is truncated."""
        return open_for_writing(path, "wb", buffering=0)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Write all of ``data``, in as many system calls as needed."""
        write_all(file.write, data)

    def sync(self, file: BinaryIO) -> None:
        """Make the content of the file durable."""
        os.fsync(file.fileno())

    def make_directory(self, path: Path) -> None:
        """Create a directory; an existing one is left unchanged."""
        path.mkdir(exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Make the names in directory ``path`` durable."""
        files.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically. An existing file ``target`` is replaced; a directory ``target`` must not exist."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Create a hard link ``target`` to the file ``source``."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Delete a file or a symbolic link, if it exists."""
        path.unlink(missing_ok=True)

    def remove_directory(self, path: Path) -> None:
        """Delete an empty directory."""
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """Return the free bytes of the file system of ``path``."""
        return shutil.disk_usage(path).free


class HashingFile:
    """A file opened for writing that counts and hashes its bytes, for ``torch.save`` and similar functions.

    A failed write raises in ``close``, not in ``write``: PyTorch's archive writer does not support exceptions there.
    """

    def __init__(self, disk: Disk, path: Path, bytes_per_second: float = 0.0) -> None:
        """Create the file.

        Args:
            bytes_per_second: write rate limit; 0 for no limit.

        Raises:
            OSError: the file cannot be created.
        """
        self.bytes = 0
        self._failure: OSError | None = None
        self._disk = disk
        self._file = disk.create(path)
        self._digest = hashlib.sha256()
        self._rate_limit = bytes_per_second
        self._start_time = time.monotonic()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of ``data`` and return its size in bytes. After a failure, further data is discarded."""
        size = memoryview(data).nbytes
        if self._failure is not None:
            return size
        try:
            self._disk.write(self._file, data)
        except OSError as error:
            self._failure = error
            return size
        self._digest.update(data)
        self.bytes += size
        if self._rate_limit:
            time.sleep(max(0.0, self._start_time + self.bytes / self._rate_limit - time.monotonic()))
        return size

    def flush(self) -> None:
        """Do nothing: the file is unbuffered."""

    def close(self) -> None:
        """Make the content durable and close the file. The directory is not synced.

        Raises:
            OSError: the content is not durable, or an earlier write has failed.
        """
        try:
            if self._failure is not None:
                raise self._failure
            self._disk.sync(self._file)
        finally:
            self._file.close()

    def abort(self) -> None:
        """Close the file without syncing it."""
        self._file.close()

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes written so far, in hexadecimal."""
        return self._digest.hexdigest()


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """Write a small file with content ``data`` and sync it. Raises OSError."""
    file = disk.create(path)
    try:
        disk.write(file, data)
        disk.sync(file)
    finally:
        file.close()
