"""The storage of backups: a local directory, or any file system that fsspec supports."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.checkpoint.naming import MANIFEST, PARTIAL, role_of
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import nearest_existing
from ds_gpt2.config.settings import flat

BLOCK = 1 << 22  # bytes read at a time
_SECRET_NAME = re.compile(r"key|secret|token|password|passwd|credential", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; shorter values would hide ordinary words


def redact(text: str) -> str:
    """Return ``text`` with credentials and parameter values in its URLs replaced by ``***``."""
    text = re.sub(r"(?<=://)(?:[^\s@]*:\S*|[^\s/@]*)@", "***@", text)
    return re.sub(r"([?&;][^\s=&;?]+=)[^\s&;'\"]+", r"\1***", text)


def redacted_reason(error: BaseException) -> str:
    """Return the message of an exception in one line, without secrets, at most 500 characters."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"  # without the error number
    text = redact(" ".join(message.split()) or type(error).__name__)
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text[:500]


def _secrets() -> list[str]:
    """Return the keys and passwords in the environment and in fsspec's configuration, longest first."""
    values = {**os.environ, **flat({"fsspec": fsspec.config.conf})}
    secrets = [value for name, value in values.items() if _SECRET_NAME.search(name) and isinstance(value, str)]
    return sorted((value for value in secrets if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def check_protocol(url: str) -> None:
    """Check that fsspec supports the protocol of ``url``; a path without a protocol is local.

    Raises:
        UserError: the protocol is unknown, or a package for it is missing.
    """
    try:
        fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0])
    except ValueError as error:
        fix = "give a directory, or a URL such as s3://bucket/folder"
        raise UserError(f"cannot back up to {redact(url)}: {redacted_reason(error)}; {fix}") from None
    except ImportError as error:  # its message names the package to install
        raise UserError(f"cannot back up to {redact(url)}: {redacted_reason(error)}") from None


def local_directory(url: str) -> Path | None:
    """Return the local directory that ``url`` names; None if it is remote. Nothing is opened."""
    protocol, path = fsspec.core.split_protocol(url)
    return Path(LocalFileSystem._strip_protocol(path)) if protocol in (None, "file", "local") else None


def file_instead_of(directory: Path) -> Path | None:
    """Return the path at or above ``directory`` that exists and is not a directory; None if there is none."""
    existing = nearest_existing(directory)
    return None if existing.is_dir() else existing


def open_storage(url: str, run_name: str, disk: Disk) -> Storage:
    """Return the directory of the run's backups at ``url``.

    Raises:
        OSError: the storage is not accessible.
    """
    with only_os_errors():
        system, root = fsspec.core.url_to_fs(url)
    if isinstance(system, LocalFileSystem):
        return LocalStorage(system, Path(root) / run_name, disk)
    return Storage(system, f"{root.rstrip('/')}/{run_name}")


@contextlib.contextmanager
def only_os_errors() -> Iterator[None]:
    """Convert all exceptions of the libraries behind fsspec, which may contain secrets, to OSError."""
    try:
        yield
    except (OSError, DamagedError):
        raise
    except Exception as error:
        raise OSError(redacted_reason(error)) from None


class Storage:
    """The directory of a run's backups on a file system of fsspec. The tag "" stands for the directory itself.

    Methods raise OSError.
    """

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root

    def tags(self) -> list[str]:
        """Return the tags of all backups, complete or not."""
        return [name for name in self._names(self._root) if role_of(name)]

    def names(self, tag: str) -> list[str]:
        """Return the names of the files of a backup."""
        return [name for name in self._names(self._path(tag)) if name != tag]  # some stores list the directory itself

    @only_os_errors()
    def size(self, tag: str, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        try:
            return int(self._fresh().info(self._path(tag, name))["size"])
        except FileNotFoundError:
            return None

    @only_os_errors()
    def read(self, tag: str, name: str, on_block: Callable[[bytes], object]) -> None:
        """Call ``on_block`` with each block of a file, in order."""
        with self._fresh().open(self._path(tag, name), "rb") as file:
            while block := file.read(BLOCK):
                on_block(block)

    def content(self, tag: str, name: str) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""
        blocks: list[bytes] = []
        try:
            self.read(tag, name, blocks.append)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return b"".join(blocks)

    @only_os_errors()
    def make(self, tag: str) -> None:
        """Create the directory of a backup.

        The parent of the run's directory is not created: it may be a mistyped bucket.
        """
        for path in (self._root, self._path(tag)):
            with contextlib.suppress(FileExistsError):
                self._system.mkdir(path, create_parents=False)

    @only_os_errors()
    def write(self, tag: str, name: str, blocks: Iterable[bytes]) -> None:
        """Write a file; an existing one is replaced."""
        with self._system.open(self._path(tag, name), "wb") as file:
            for block in blocks:
                file.write(block)

    def probe(self) -> None:
        """Write a small file, read it back and delete it, together with the directories created for it.

        Raises:
            OSError: one of these operations fails.
        """
        tag, data = f"probe-{uuid.uuid4().hex}", os.urandom(64)
        existed = self._is_directory(self._root)
        try:
            self.make(tag)
            self.write(tag, "probe", [data])
            if self.content(tag, "probe") != data:
                raise OSError(f"{redact(self._root)}: a file does not read back as it was written")
            self.remove_file(tag, "probe")
            if self.size(tag, "probe") is not None:
                raise OSError(f"{redact(self._root)}: a deleted file still exists")
        finally:
            self._remove_probe(tag, existed)

    def _remove_probe(self, tag: str, existed: bool) -> None:
        """Delete the files of ``probe``; the run's directory too if it did not exist before and is empty."""
        with contextlib.suppress(Exception):
            self._system.rm_file(self._path(tag, "probe"))
        for path in (self._path(tag), *([] if existed else [self._root])):
            with contextlib.suppress(Exception):
                if self._is_directory(path) and not self._names(path):
                    self._system.rmdir(path)

    @only_os_errors()
    def _is_directory(self, path: str) -> bool:
        return bool(self._fresh().isdir(path))

    def sync(self, tag: str) -> None:
        """Make the names of a backup's files durable. Here it does nothing: remote file systems have no such call."""

    @only_os_errors()
    def remove_file(self, tag: str, name: str) -> None:
        """Delete a file."""
        self._system.rm_file(self._path(tag, name))

    @only_os_errors()
    def remove(self, tag: str) -> None:
        """Delete all files of a backup, its manifest first."""
        if self.size(tag, MANIFEST) is not None:
            self.remove_file(tag, MANIFEST)
        with contextlib.suppress(FileNotFoundError):  # in object stores, a directory without files does not exist
            self._system.rm(self._path(tag), recursive=True)

    @only_os_errors()
    def _names(self, path: str) -> list[str]:
        try:
            return [found.rstrip("/").rsplit("/", 1)[-1] for found in self._fresh().ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _fresh(self) -> Any:
        """Return the file system with an empty cache: another process may have changed the files."""
        self._system.invalidate_cache()
        return self._system

    def _path(self, *parts: str) -> str:
        return "/".join(part for part in (self._root, *parts) if part)


class LocalStorage(Storage):
    """A directory on a local or mounted disk. Writes are durable after ``sync``."""

    def __init__(self, system: Any, root: Path, disk: Disk) -> None:
        super().__init__(system, str(root))
        self.root = root
        self._disk = disk

    def exists(self) -> bool:
        """Return whether the directory that contains those of the runs exists."""
        return self.root.parent.is_dir()

    def tags(self) -> list[str]:
        self._check_exists()
        return super().tags()

    def make(self, tag: str) -> None:
        self._check_exists()
        for path in (self.root, self.root / tag):
            self._disk.make_directory(path)
            self._disk.sync_directory(path.parent)

    def write(self, tag: str, name: str, blocks: Iterable[bytes]) -> None:
        """Write a file under a temporary name and rename it: an existing file may be hard-linked elsewhere."""
        path = self.root / tag / name
        unfinished = path.with_name(name + PARTIAL)
        file = self._disk.create(unfinished)
        try:
            for block in blocks:
                self._disk.write(file, block)
            self._disk.sync(file)
            _drop_from_cache(file)  # so that reading it back reads the medium
        finally:
            file.close()
        self._disk.rename(unfinished, path)

    def _check_exists(self) -> None:
        """Raise OSError if the directory does not exist.

        An unmounted disk must not be mistaken for an empty one. Its directory is not created: that would fill the disk
        of the mount point.
        """
        if (file := file_instead_of(self.root)) is not None:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory (set checkpoint.backup.to to one)", str(file))
        if not self.exists():
            hint = "no such directory (create it, or mount its disk)"
            raise FileNotFoundError(errno.ENOENT, hint, str(self.root.parent))

    def sync(self, tag: str) -> None:
        self._disk.sync_directory(self.root / tag)

    def remove_file(self, tag: str, name: str) -> None:
        self._disk.unlink(self.root / tag / name)

    def remove(self, tag: str) -> None:
        commit.remove(self._disk, self.root, tag)


def _drop_from_cache(file: BinaryIO) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
