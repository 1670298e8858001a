"""Find the files to read: files given by the user, and text files below given directories."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.dataset import INDEX, UNFINISHED
from ds_gpt2.data.prepare import formats
from ds_gpt2.data.prepare.unpacking import naming_errors
from ds_gpt2.data.shards import SUFFIXES

log = logging.getLogger(__name__)

_MOST_LISTED = 10  # files; further ones are counted

_Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class FoundFile:
    """A file to read."""

    path: Path
    is_named: bool  # given by the user, not found in a directory


@dataclass
class _Search:
    """The result of the search so far."""

    files: list[FoundFile] = field(default_factory=list)
    identities: set[_Identity] = field(default_factory=set)
    hidden: int = 0
    special: int = 0  # pipes, sockets, devices
    datasets: list[Path] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # with reasons
    unknown: Counter[str] = field(default_factory=Counter)  # by suffix


def find_files(paths: Iterable[Path]) -> list[FoundFile]:
    """Return the given files, and all files below the given directories with a suffix of text, sorted.

    Links are followed; no file is returned twice. Hidden files, prepared datasets and files of other suffixes are left
    out. A warning reports what was left out and what cannot be read.

    Raises:
        UserError: a path does not exist or cannot be read, or no file was found.
    """
    search = _Search()
    for path in paths:
        _add(search, path)
    for line in _warnings(search):
        log.warning(line)
    if not search.files:
        raise UserError(f"no text found. Supported files: {formats.READABLE}")
    return search.files


def _add(search: _Search, path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which cannot be read: {error.strerror}"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise UserError(f"no such text file or directory: {path}") from None
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        for child in sorted(_walk(search, path)):
            with naming_errors(child):
                _add_file(search, child, child.stat(), is_named=False)
    elif stat.S_ISREG(status.st_mode):
        _add_file(search, path, status, is_named=True)
    else:
        raise UserError(f"{path} is not a regular file (a pipe or a device): write its content to a file first")


def _add_file(search: _Search, path: Path, status: os.stat_result, is_named: bool) -> None:
    identity = (status.st_dev, status.st_ino)
    if identity in search.identities:
        search.duplicates.append(str(path))
        return
    search.identities.add(identity)
    search.files.append(FoundFile(path, is_named))


def _walk(search: _Search, top: Path) -> Iterator[Path]:
    """Yield all files with a suffix of text. A directory with several links is searched once, under its own name."""
    entered: set[_Identity] = set()
    queue = deque([top])
    while queue:
        directory = queue.popleft()
        try:
            status = directory.stat()
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            search.unreadable.append(f"{directory} ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in entered:
            search.duplicates.append(str(directory))
            continue
        entered.add((status.st_dev, status.st_ino))
        if directory != top and _is_dataset(directory, entries):
            search.datasets.append(directory)
            continue
        files, directories, links = _classify(search, entries)
        yield from files
        queue.extendleft(reversed(directories))
        queue.extend(links)  # after all directories that are not links


def _classify(search: _Search, entries: list[os.DirEntry[str]]) -> tuple[list[Path], list[Path], list[Path]]:
    """Return (files to read, directories to search, links to directories) of one directory."""
    files: list[Path] = []
    directories: list[Path] = []
    links: list[Path] = []
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            search.hidden += 1
            continue
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            search.unreadable.append(f"{path} ({_reason(entry, error)})")
            continue
        if stat.S_ISDIR(mode):
            (links if entry.is_symlink() else directories).append(path)
        elif not stat.S_ISREG(mode):
            search.special += 1
        elif formats.is_searched(entry.name):
            files.append(path)
        else:
            search.unknown[formats.suffix_of(entry.name) or "without suffix"] += 1
    return files, directories, links


def _reason(entry: os.DirEntry[str], error: OSError) -> str:
    if entry.is_symlink() and error.errno == errno.ENOENT:
        return f"a link to {os.readlink(entry.path)}, which does not exist"
    return error.strerror or str(error)


def _is_dataset(directory: Path, entries: list[os.DirEntry[str]]) -> bool:
    """Return whether ``prepare`` has written or is writing this directory."""
    names = {entry.name for entry in entries}
    return directory.name.endswith(UNFINISHED) or (INDEX in names and any(name.endswith(SUFFIXES) for name in names))


def _warnings(search: _Search) -> Iterator[str]:
    if search.unreadable:
        yield f"left out because they cannot be read: {_listed(search.unreadable)}"
    if search.duplicates:
        yield f"read once although found more than once: {_listed(search.duplicates)}"
    if search.datasets:
        yield f"prepared datasets left out: {_listed(map(str, search.datasets))}"
    if search.hidden:
        yield f"hidden files and directories left out: {search.hidden:,}"
    if search.special:
        yield f"pipes, sockets and devices left out: {search.special:,}"
    if search.unknown:
        suffixes = (f"{count:,} {suffix}" for suffix, count in search.unknown.most_common())
        yield f"files left out, by suffix: {_listed(suffixes)}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
