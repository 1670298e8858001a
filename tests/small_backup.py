"""Small checkpoints and their copies, in a local directory and in fsspec's memory file system."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.queue import BackupQueue, StoppedError
from ds_gpt2.checkpoint.catalog import Generation, open_generation
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.settings import BackupSettings

SETTINGS = BackupSettings(every=100, keep=2)
FILES = ("a.pt", "b.pt", "c.pt")
SIZE = 1000  # bytes of each file
MEMORY = "memory://nas"


def changed_settings(**changes: object) -> BackupSettings:
    """Return ``SETTINGS`` with some values replaced."""
    return SETTINGS.model_copy(update=changes)


def content(name: str, seed: int) -> bytes:
    """Return the content of file ``name``."""
    return hashlib.shake_128(f"{name} {seed}".encode()).digest(SIZE)


def save(
    directory: Path,
    step: int,
    seed: int = 0,
    names: tuple[str, ...] = FILES,
    minute: int | None = None,
    evaluated: bool = True,
) -> Generation:
    """Commit a small checkpoint, as training does.

    Args:
        minute: the time of creation, in minutes since midnight of 1 January 2026; None: ``step``.
    """
    tag = rolling_tag(step)
    partial = directory / (tag + ".tmp")
    partial.mkdir(parents=True)
    files = {}
    for name in names:
        (partial / name).write_bytes(content(name, seed))
        files[name] = FileEntry(bytes=SIZE, sha256=hashlib.sha256(content(name, seed)).hexdigest())
    minute = step % 1440 if minute is None else minute
    manifest = Manifest(
        created=f"2026-01-01T{minute // 60:02d}:{minute % 60:02d}:00+00:00",
        epoch=0.5,
        state={"step": step, "unevaluated": None if evaluated else {}},
        world_size=1,
        identity={},
        settings={},
        versions={},
        files=files,
    )
    commit.commit(Disk(), directory, tag, manifest)
    return open_generation(directory / tag)


def link(directory: Path, source: str, tag: str) -> Generation:
    """Create checkpoint ``tag`` from ``source``, as training does for epochs and the best checkpoint."""
    commit.link(Disk(), directory / source, directory, tag)
    return open_generation(directory / tag)


def read_at(location: str, tag: str) -> dict[str, bytes]:
    """Return every file of a copy, read without the code under test."""
    if location.startswith("memory://"):
        start = f"/nas/run/{tag}/"
        store = MemoryFileSystem.store
        return {path.removeprefix(start): file.getvalue() for path, file in store.items() if path.startswith(start)}
    path = Path(location) / "run" / tag
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}


def write_at(location: str, tag: str, name: str, data: bytes) -> None:
    """Write a file of a copy without the code under test."""
    if location.startswith("memory://"):
        MemoryFileSystem().pipe_file(f"/nas/run/{tag}/{name}", data)
    else:
        (Path(location) / "run" / tag / name).write_bytes(data)


def read_in(path: Path) -> dict[str, bytes]:
    """Return every file of a checkpoint."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def flipped(data: bytes) -> bytes:
    """Return ``data`` with the last bit flipped."""
    return data[:-1] + bytes([data[-1] ^ 1])


def tags(backup: Backup) -> list[str]:
    """Return the tags of the committed copies, the last created first."""
    return [copy.tag for copy in backup.copies()]


class Interrupter:
    """A progress callback that interrupts the copy after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def __call__(self, _: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoppedError("interrupted")


class Gate:
    """Blocks every write to the memory file system until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = MemoryFile.write

        def wait_and_write(file: MemoryFile, data: bytes) -> int:
            self.reached.set()
            assert self.open.wait(60)
            return write(file, data)

        monkeypatch.setattr(MemoryFile, "write", wait_and_write)


def settle(queue: BackupQueue) -> None:
    """Wait until the queue has made all copies so far."""
    queue._thread.submit(lambda: None).result(60)


def clear_memory() -> None:
    """Delete all files of the memory file system."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
