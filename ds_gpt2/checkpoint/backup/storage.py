"""Where copies of checkpoints can lie: a directory of this machine's, or whatever else fsspec reaches."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped]  # it has no types
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # nor this

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.checkpoint.naming import MANIFEST, PARTIAL, role_of
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import flat

BLOCK = 1 << 22  # bytes read at a time
_SECRET_NAME = re.compile(r"key|secret|token|password|passwd|credential", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; shorter values would hide ordinary words


def redact(text: str) -> str:
    """``text`` without what may be secret in the URLs in it: who logs in with what, and the values of parameters."""
    text = re.sub(r"(?<=://)(?:[^\s@]*:\S*|[^\s/@]*)@", "***@", text)
    return re.sub(r"([?&;][^\s=&;?]+=)[^\s&;'\"]+", r"\1***", text)


def reason_of(error: BaseException) -> str:
    """An exception as one line that may be shown."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"  # without the number that Python puts before it
    text = redact(" ".join(said.split()) or type(error).__name__)
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text[:500]


def _secrets() -> list[str]:
    """Keys and passwords that the file systems were given, by the environment or by fsspec's settings."""
    given = {**os.environ, **flat({"fsspec": fsspec.config.conf})}
    secrets = [value for name, value in given.items() if _SECRET_NAME.search(name) and isinstance(value, str)]
    return sorted((value for value in secrets if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def check_protocol(place: str) -> None:
    """
    Raises:
        UserError: nothing here can reach a place of that kind.
    """
    try:
        fsspec.get_filesystem_class(fsspec.core.split_protocol(place)[0])
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot copy to {redact(place)}: {reason_of(error)}") from None


def local_directory(place: str) -> Path | None:
    """Return the directory that ``place`` names; None if it is no path of this machine's. Nothing is opened."""
    protocol, path = fsspec.core.split_protocol(place)
    return Path(LocalFileSystem._strip_protocol(path)) if protocol in (None, "file", "local") else None


def file_instead_of(directory: Path) -> Path | None:
    """Return what exists in the place of ``directory`` or of one of its parents and is not a directory."""
    existing = next((path for path in (directory, *directory.parents) if os.path.lexists(path)), None)
    return existing if existing is not None and not existing.is_dir() else None


def open_storage(url: str, run_name: str, disk: Disk) -> Storage:
    """The directory of a run's copies at ``url``.

    Raises:
        OSError: it cannot be reached.
    """
    with only_os_errors():
        system, root = fsspec.core.url_to_fs(url)
    if isinstance(system, LocalFileSystem):
        return LocalStorage(system, Path(root) / run_name, disk)
    return Storage(system, f"{root.rstrip('/')}/{run_name}")


@contextlib.contextmanager
def only_os_errors() -> Iterator[None]:
    """The libraries behind fsspec raise what they like, with URLs in it; from here on it is an OSError."""
    try:
        yield
    except (OSError, DamagedError):
        raise
    except Exception as error:
        raise OSError(reason_of(error)) from None


class Storage:
    """The directory of a run's copies on any file system of fsspec. The tag "" means the directory itself."""

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root

    def tags(self) -> list[str]:
        """Names of checkpoints, whether or not there is a marker."""
        return [name for name in self._names(self._root) if role_of(name)]

    def names(self, tag: str) -> list[str]:
        return [name for name in self._names(self._path(tag)) if name != tag]  # some stores list the directory itself

    @only_os_errors()
    def size(self, tag: str, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            return int(self._fresh().info(self._path(tag, name))["size"])
        except FileNotFoundError:
            return None

    @only_os_errors()
    def read(self, tag: str, name: str, take: Callable[[bytes], object]) -> None:
        """Give the content of a file to ``take``, block by block."""
        with self._fresh().open(self._path(tag, name), "rb") as file:
            while block := file.read(BLOCK):
                take(block)

    def content(self, tag: str, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        blocks: list[bytes] = []
        try:
            self.read(tag, name, blocks.append)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return b"".join(blocks)

    @only_os_errors()
    def make(self, tag: str) -> None:
        """A directory for a copy; never the place itself: a mistyped bucket would be created."""
        for path in (self._root, self._path(tag)):
            with contextlib.suppress(FileExistsError):
                self._system.mkdir(path, create_parents=False)

    @only_os_errors()
    def write(self, tag: str, name: str, blocks: Iterable[bytes]) -> None:
        with self._system.open(self._path(tag, name), "wb") as file:
            for block in blocks:
                file.write(block)

    def probe(self) -> None:
        """Write a small file, read it back and delete it, with the directories that were made for it.

        Raises:
            OSError: one of these does not work.
        """
        tag, data = f"probe-{uuid.uuid4().hex}", os.urandom(64)
        was_there = self._is_directory(self._root)
        try:
            self.make(tag)
            self.write(tag, "probe", [data])
            if self.content(tag, "probe") != data:
                raise OSError(f"{redact(self._root)}: a file does not read back as it was written")
            self.remove_file(tag, "probe")
            if self.size(tag, "probe") is not None:
                raise OSError(f"{redact(self._root)}: a file is still there after it was deleted")
        finally:
            self._unmake(tag, was_there)

    def _unmake(self, tag: str, was_there: bool) -> None:
        """Remove what ``probe`` has left; the run's directory only if it is empty and new."""
        with contextlib.suppress(Exception):
            self._system.rm_file(self._path(tag, "probe"))
        for path in (self._path(tag), *([] if was_there else [self._root])):
            with contextlib.suppress(Exception):
                if self._is_directory(path) and not self._names(path):
                    self._system.rmdir(path)

    @only_os_errors()
    def _is_directory(self, path: str) -> bool:
        return bool(self._fresh().isdir(path))

    def sync(self, tag: str) -> None:
        """The names of files are as durable as they become by themselves."""

    @only_os_errors()
    def remove_file(self, tag: str, name: str) -> None:
        self._system.rm_file(self._path(tag, name))

    @only_os_errors()
    def remove(self, tag: str) -> None:
        """All files, the marker first."""
        if self.size(tag, MANIFEST) is not None:
            self.remove_file(tag, MANIFEST)
        with contextlib.suppress(FileNotFoundError):  # a directory that was nothing but its marker
            self._system.rm(self._path(tag), recursive=True)

    @only_os_errors()
    def _names(self, path: str) -> list[str]:
        try:
            return [found.rstrip("/").rsplit("/", 1)[-1] for found in self._fresh().ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _fresh(self) -> Any:
        """The file system, without what it remembers: another process may have been there."""
        self._system.invalidate_cache()
        return self._system

    def _path(self, *parts: str) -> str:
        return "/".join(part for part in (self._root, *parts) if part)


class LocalStorage(Storage):
    """A directory on a disk or a mounted one: durable when it says so."""

    def __init__(self, system: Any, root: Path, disk: Disk) -> None:
        super().__init__(system, str(root))
        self.root = root
        self._disk = disk

    def is_there(self) -> bool:
        return self.root.parent.is_dir()

    def tags(self) -> list[str]:
        self._check_there()
        return super().tags()

    def make(self, tag: str) -> None:
        self._check_there()
        for path in (self.root, self.root / tag):
            self._disk.make_directory(path)
            self._disk.sync_directory(path.parent)

    def write(self, tag: str, name: str, blocks: Iterable[bytes]) -> None:
        """Under another name first: a file of this name may be hard-linked from somewhere."""
        path = self.root / tag / name
        unfinished = path.with_name(name + PARTIAL)
        file = self._disk.create(unfinished)
        try:
            for block in blocks:
                self._disk.write(file, block)
            self._disk.sync(file)
            _forget_cached(file)  # reading back shall read the medium
        finally:
            file.close()
        self._disk.rename(unfinished, path)

    def _check_there(self) -> None:
        """What is not mounted must not look empty, nor be made: that would fill the disk below the mount point."""
        if (file := file_instead_of(self.root)) is not None:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory (set checkpoint.backup.to to one)", str(file))
        if not self.is_there():
            hint = "no such directory (make it, or mount what belongs there)"
            raise FileNotFoundError(errno.ENOENT, hint, str(self.root.parent))

    def sync(self, tag: str) -> None:
        self._disk.sync_directory(self.root / tag)

    def remove_file(self, tag: str, name: str) -> None:
        self._disk.unlink(self.root / tag / name)

    def remove(self, tag: str) -> None:
        commit.remove(self._disk, self.root, tag)


def _forget_cached(file: BinaryIO) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
