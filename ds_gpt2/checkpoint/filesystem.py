"""The file operations that committing a checkpoint consists of.

Each is one call, so that tests can record them, fail them one by one, and replay what a power cut would leave.
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
    """The real file system. Anything but ``sync`` and ``sync_directory`` may be undone by a power cut."""

    def create(self, path: Path) -> BinaryIO:
        """A new file for writing, unbuffered; a file of that name is emptied."""
        return open_for_writing(path, "wb", buffering=0)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """All of ``data``, however many calls the system needs for it."""
        write_all(file.write, data)

    def sync(self, file: BinaryIO) -> None:
        """The file's content is on the medium when this returns."""
        os.fsync(file.fileno())

    def make_directory(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        """The names in ``path`` are on the medium when this returns."""
        files.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic; a file ``target`` is replaced, a directory must not be there."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for the same bytes."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_directory(self, path: Path) -> None:
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """What may still be written below ``path``."""
        return shutil.disk_usage(path).free


class HashingFile:
    """A file being written, for ``torch.save`` and the like: counts and hashes the bytes on their way to the disk.

    A write that fails is remembered and told by ``close``: PyTorch's archive writer must not meet an exception midway.
    """

    def __init__(self, disk: Disk, path: Path, bytes_per_second: float = 0.0) -> None:
        """
        Args:
            bytes_per_second: the most that may be written a second; 0 for no limit.
        """
        self.bytes = 0
        self._failure: OSError | None = None
        self._disk = disk
        self._file = disk.create(path)
        self._digest = hashlib.sha256()
        self._pace = bytes_per_second
        self._begun = time.monotonic()

    def write(self, data: bytes | memoryview) -> int:
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
        if self._pace:
            time.sleep(max(0.0, self._begun + self.bytes / self._pace - time.monotonic()))
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> None:
        """Make the content durable; the names in its directory are another matter.

        Raises:
            OSError: it is not, or a write before has failed.
        """
        try:
            if self._failure is not None:
                raise self._failure
            self._disk.sync(self._file)
        finally:
            self._file.close()

    def abort(self) -> None:
        """Close without making anything durable."""
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """A whole small file, its content durable."""
    file = disk.create(path)
    try:
        disk.write(file, data)
        disk.sync(file)
    finally:
        file.close()
