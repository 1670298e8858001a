"""Fake and real disks for tests: disks that record, fail, fill up, pause, or are mounted from a file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Literal, TypeVar

import pytest

from ds_gpt2.checkpoint.filesystem import Disk

Kind = Literal[
    "create", "write", "sync", "make_directory", "sync_directory", "rename", "link", "unlink", "remove_directory"
]
Step = tuple[str, int]  # the site and the line of a call of the disk
T = TypeVar("T")

# The modules whose functions are recorded as the site of an operation.
_PROTOCOL = ("ds_gpt2.checkpoint.commit", "ds_gpt2.checkpoint.filesystem", "ds_gpt2.checkpoint.weights")


@dataclass(frozen=True)
class Operation:
    """One file operation below a root; paths are relative to the root."""

    kind: Kind
    path: str
    target: str = ""  # of rename and link
    data: bytes = b""  # of write
    site: str = ""  # the calling functions of the protocol, outermost first, and the kind
    line: int = 0  # in the last of these functions

    @property
    def step(self) -> Step:
        return self.site, self.line

    def __str__(self) -> str:
        """Return the kind and the file name, as ``sync a.pt``; the name of a synced directory ends with a slash."""
        name = (self.target or self.path).rpartition("/")[2]
        return f"sync {name}/" if self.kind == "sync_directory" else f"{self.kind} {name}"


class KilledError(BaseException):
    """The process ends at this operation. No handler of the protocol catches it."""


class RecordingDisk(Disk):
    """Performs and records all operations. Syncs are only recorded, because a test need not wait for them."""

    def __init__(self, root: Path, links: bool = True) -> None:
        """
        Args:
            links: whether the file system has hard links.
        """
        self.operations: list[Operation] = []
        self.dies_at: int | None = None  # the number of operations after which ``KilledError`` is raised
        self.skipped: Step | None = None  # a call that is not performed: the protocol without this line
        self._root = root
        self._links = links

    def create(self, path: Path) -> BinaryIO:
        file = self._perform("create", partial(super().create, path), path)
        assert file is not None, "the creation of a file cannot be skipped"
        return file

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self._perform("write", partial(super().write, file, data), Path(file.name), data=bytes(data))

    def sync(self, file: BinaryIO) -> None:
        self._perform("sync", lambda: None, Path(file.name))

    def make_directory(self, path: Path) -> None:
        if not path.is_dir():
            self._perform("make_directory", partial(super().make_directory, path), path)

    def sync_directory(self, path: Path) -> None:
        self._perform("sync_directory", partial(os.listdir, path), path)  # fails where a sync would fail

    def rename(self, source: Path, target: Path) -> None:
        self._perform("rename", partial(super().rename, source, target), source, target)

    def link(self, source: Path, target: Path) -> None:
        if not self._links:
            raise PermissionError(1, "Operation not permitted")
        self._perform("link", partial(super().link, source, target), source, target)

    def unlink(self, path: Path) -> None:
        self._perform("unlink", partial(super().unlink, path), path)

    def remove_directory(self, path: Path) -> None:
        self._perform("remove_directory", partial(super().remove_directory, path), path)

    def _perform(
        self, kind: Kind, action: Callable[[], T], path: Path, target: Path | None = None, data: bytes = b""
    ) -> T | None:
        if self.dies_at is not None and len(self.operations) >= self.dies_at:
            raise KilledError
        functions, line = _calling_functions()
        operation = Operation(
            kind, self._name(path), self._name(target) if target else "", data, f"{functions}: {kind}", line
        )
        if operation.step == self.skipped:
            return None
        result = action()
        self.operations.append(operation)
        return result

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _calling_functions() -> tuple[str, int]:
    """Return the functions of the protocol in the call stack, and the line in the last of them."""
    names: list[str] = []
    line = 0
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if frame.f_globals["__name__"] in _PROTOCOL and not code.co_name.startswith("<"):
            line = line or frame.f_lineno
            names.insert(0, code.co_name)
        frame = frame.f_back
    return " > ".join(names), line


@dataclass(frozen=True)
class Fault:
    """A kind of failure of a disk."""

    name: str
    error: int
    kinds: frozenset[Kind]  # of the operations that fail
    lasting: bool = False  # whether all later operations of these kinds fail too

    def __str__(self) -> str:
        return self.name


_ALLOCATING = frozenset[Kind](("create", "write", "make_directory", "link", "rename"))
_ALL = _ALLOCATING | frozenset[Kind](("sync", "sync_directory", "unlink", "remove_directory"))
IO_ERROR = Fault("an I/O error", errno.EIO, _ALL)
FAULTS = [
    Fault("no space left", errno.ENOSPC, _ALLOCATING, lasting=True),
    IO_ERROR,
    Fault("a permanent failure", errno.EIO, _ALL, lasting=True),
]


class FailingDisk(RecordingDisk):
    """Fails at the operation number ``at`` of certain kinds, counted from 0. A failing write writes half its data."""

    def __init__(self, root: Path, at: int, fault: Fault = IO_ERROR) -> None:
        super().__init__(root)
        self.failed = self.repaired = False
        self._fault = fault
        self._left = at
        self._lock = threading.Lock()  # several ranks use the disk

    def _perform(
        self, kind: Kind, action: Callable[[], T], path: Path, target: Path | None = None, data: bytes = b""
    ) -> T | None:
        if not self._fails(kind):
            return super()._perform(kind, action, path, target, data)
        if kind == "write":
            with path.open("ab") as file:
                file.write(data[: len(data) // 2])
        raise OSError(self._fault.error, os.strerror(self._fault.error))

    def _fails(self, kind: Kind) -> bool:
        with self._lock:
            if self.repaired or kind not in self._fault.kinds or (self.failed and not self._fault.lasting):
                return False
            self._left -= 1
            self.failed = self.failed or self._left < 0
            return self.failed


class _ShortWrites(io.FileIO):
    """A file that writes only half of the data at each call."""

    def write(self, data: memoryview) -> int:  # type: ignore[override]  # our code writes memoryviews only
        return super().write(data[: (len(data) + 1) // 2])


class ShortWritingDisk(RecordingDisk):
    """Makes short writes to the file number ``at``, counted from 0."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.created = 0
        self._at = at

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self.created += 1
        if self.created - 1 != self._at:
            return file
        file.close()
        return _ShortWrites(path, "wb")


class SmallDisk(Disk):
    """Reports as free what ``*.pt`` files leave of ``size`` bytes; hard links need no space."""

    def __init__(self, size: int) -> None:
        self.size = size

    def free_bytes(self, path: Path) -> int:
        files = {file.stat().st_ino: file.stat().st_size for file in path.rglob("*.pt")}
        return self.size - sum(files.values())


class PausableDisk(Disk):
    """Writes wait until ``ready`` is set, and fail if ``full`` is set; ``free`` replaces the reported free bytes."""

    full = False
    free: int | None = None

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.ready.set()

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self.ready.wait()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data)

    def free_bytes(self, path: Path) -> int:
        return super().free_bytes(path) if self.free is None else self.free


@dataclass
class LoopDisk:
    """A real ext4 file system in a file, mounted at a directory."""

    image: Path
    directory: Path

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.directory], check=True, capture_output=True)

    def unmount(self) -> None:
        """Unmount the disk, even while files are open."""
        subprocess.run(["umount", "--lazy", self.directory], check=True)

    def fail(self) -> None:
        """Make the disk read-only, as after an error of the medium."""
        subprocess.run(["mount", "-o", "remount,abort", self.directory], check=True)

    def repair(self) -> None:
        self.unmount()
        subprocess.run(["e2fsck", "-y", self.image], check=False, capture_output=True)
        self.mount()

    def fill(self) -> None:
        """Leave no byte free."""
        with contextlib.suppress(OSError), (self.directory / "filler").open("ab", buffering=0) as file:
            for size in (2**20, 2**10, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        """Undo ``fill``."""
        (self.directory / "filler").unlink()


@contextlib.contextmanager
def loop_disks(folder: Path) -> Iterator[Callable[..., LoopDisk]]:
    """Provide a function that creates and mounts a disk with a given name in ``folder``; unmount all disks at the end.

    The test is skipped if this process may not mount a file.
    """
    disks: list[LoopDisk] = []

    def make(name: str, megabytes: int = 200) -> LoopDisk:
        disk = LoopDisk(folder / f"{name}.img", folder / name)
        disk.directory.mkdir(exist_ok=True)
        with disk.image.open("wb") as file:
            file.truncate(megabytes << 20)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", disk.image], check=True, capture_output=True)
            disk.mount()
        except (OSError, subprocess.CalledProcessError) as error:  # not root, no loop devices, or another system
            pytest.skip(f"needs mkfs.ext4 and the permission to mount a file: {error}")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        while subprocess.run(["mountpoint", "-q", disk.directory]).returncode == 0:
            disk.unmount()
