"""The commit protocol: how the bytes of a checkpoint become one, and cease to be one, whatever moment the power fails.

1. Each rank writes its files into ``<tag>.tmp/``, each synced, then its record: their sizes and hashes.
2. When all records are there rank 0 writes the manifest, syncs it, then the names in the directory.
3. The directory is renamed to ``<tag>`` and the parent synced: from here on the checkpoint exists.
4. ``latest_backup`` and ``latest`` move by rename; the parent is synced.

A checkpoint is removed in the other direction: its manifest first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

from ds_gpt2.checkpoint.filesystem import Disk, HashingFile, write_file
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest, encode, read, size_problem_of
from ds_gpt2.checkpoint.naming import COPYING, LATEST, LATEST_BACKUP, MANIFEST, PARTIAL, role_of, superseded_tag
from ds_gpt2.common import safe_json
from ds_gpt2.common.files import is_real_directory, read_small, regular_only

log = logging.getLogger(__name__)

_SAME_STATE = ("step", "batch", "tokens", "ledger", "weights")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}


def record_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def write_record(disk: Disk, partial: Path, rank: int, files: dict[str, FileEntry]) -> None:
    """Say that all files of ``rank`` are written and synced, and what is in them."""
    _write_record(disk, partial, rank, {"files": {name: entry.model_dump() for name, entry in files.items()}})


def write_failure(disk: Disk, partial: Path, rank: int, reason: str) -> None:
    """Say that ``rank`` could not write its files, so that nobody waits for them."""
    _write_record(disk, partial, rank, {"failed": reason})


def read_record(partial: Path, rank: int) -> dict[str, FileEntry] | None:
    """The files of ``rank``; None while it is still writing.

    Raises:
        OSError: the rank could not write them; the message says why.
    """
    try:
        content = safe_json.read(partial / record_name(rank))
        if "failed" not in content:
            return {name: FileEntry.model_validate(entry) for name, entry in content["files"].items()}
        reason = str(content["failed"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError):
        reason = "its record is damaged"
    raise OSError(f"rank {rank}: {reason}")


def commit(disk: Disk, directory: Path, tag: str, manifest: Manifest) -> None:
    """Turn ``<tag>.tmp``, in which every rank has left its record, into the checkpoint ``tag``.

    Raises:
        OSError: it is not known to be durable.
    """
    partial = directory / (tag + PARTIAL)
    for rank in range(manifest.world_size):
        disk.unlink(partial / record_name(rank))
    write_file(disk, partial / MANIFEST, encode(manifest))
    disk.sync_directory(partial)
    publish(disk, directory, tag)


def point_to(disk: Disk, directory: Path, tag: str) -> None:
    """Move ``latest`` to ``tag``, and ``latest_backup`` to where ``latest`` was."""
    before = read_pointer(directory, LATEST)
    if before is not None and before != tag and (directory / before / MANIFEST).exists():
        _move_pointer(disk, directory, LATEST_BACKUP, before)
    _move_pointer(disk, directory, LATEST, tag)
    disk.sync_directory(directory)


def read_pointer(directory: Path, name: str) -> str | None:
    """The tag that ``latest`` or ``latest_backup`` names; None if it names none."""
    try:
        tag = read_small(directory / name).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None  # a convenience for people and DeepSpeed: a resume looks at the checkpoints themselves
    return tag if role_of(tag) else None


def link(disk: Disk, source: Path, directory: Path, tag: str) -> None:
    """Make the checkpoint in ``source`` known as ``tag`` too: the same files, linked where the file system can.

    An older checkpoint ``tag`` is replaced; a rolling one is superseded.
    """
    partial = directory / (tag + PARTIAL)
    discard(disk, partial)
    disk.make_directory(partial)
    for name in [*read(source).files, MANIFEST]:  # the marker last
        _link_or_copy(disk, source / name, partial / name)
    disk.sync_directory(partial)
    publish(disk, directory, tag)


def supersede(disk: Disk, directory: Path, tag: str) -> None:
    """Rename a checkpoint that is no longer part of the run's history, but may be wanted back by a person.

    What is only another name for the same step, or too damaged to tell its step, is removed.
    """
    rolling = role_of(tag) == "rolling"
    target: str | None
    try:
        target = superseded_tag(read(directory / tag).step)
    except DamagedError:
        target = superseded_tag(int(tag.rsplit("_", 1)[1])) if rolling else None
    if target is None or (not rolling and _is_spare(directory / tag, directory / target)):
        remove(disk, directory, tag)
        return
    remove(disk, directory, target)
    disk.rename(directory / tag, directory / target)
    disk.sync_directory(directory)


def remove(disk: Disk, directory: Path, tag: str) -> None:
    """Delete a checkpoint, its marker first: a half-deleted one is none. No such checkpoint: nothing happens."""
    path = directory / tag
    if path.is_symlink():
        disk.unlink(path)
        return
    if not path.is_dir():
        return
    with contextlib.suppress(FileNotFoundError):  # somebody else deletes it too
        disk.unlink(path / MANIFEST)
        disk.sync_directory(path)
        discard(disk, path)


def discard_failed_commit(disk: Disk, directory: Path, tag: str) -> None:
    """After a failed ``commit``: remove what it left, unless that is whole and the only one: a start finishes it."""
    partial = directory / (tag + PARTIAL)
    if (directory / tag / MANIFEST).exists() or not _is_complete(partial):
        remove(disk, directory, partial.name)


def sweep(disk: Disk, directory: Path) -> None:
    """Before a run goes on: finish what was complete when a crash came, remove what was not; say so, one by one.

    Only names of this project's own making are touched. What a killed process has left may not be on the medium yet:
    it is made so before anything is built on it.
    """
    if not directory.is_dir():
        return
    disk.sync_directory(directory)
    for path in sorted(directory.iterdir()):
        try:
            _sweep_one(disk, directory, path)
        except OSError as error:  # the others are none the worse for it
            log.warning(f"could not clean up {path}: {error}")
    sweep_copying(disk, directory)


def has_unfinished_commit(directory: Path) -> bool:
    """Whether ``sweep`` would finish a checkpoint in ``directory``, which nothing else finds until then."""
    partial = directory.glob("*" + PARTIAL) if directory.is_dir() else ()
    return any(
        role_of(path.name.removesuffix(PARTIAL)) is not None and is_real_directory(path) and _is_complete(path)
        for path in partial
    )


def _sweep_one(disk: Disk, directory: Path, path: Path) -> None:
    tag = path.name.removesuffix(PARTIAL)
    if path.name in (LATEST + PARTIAL, LATEST_BACKUP + PARTIAL):
        disk.unlink(path)
    elif role_of(tag) is None or not (path.is_dir() or path.is_symlink()):
        return
    elif path.is_symlink():
        if path.name != tag:  # nothing of ours is written through a link
            disk.unlink(path)
            log.info(f"removed the link {path.name}")
    elif path.name != tag and _is_complete(path):
        _make_durable(disk, path)
        publish(disk, directory, tag)
        log.info(f"finished the commit of {tag}")
    elif path.name != tag or not (path / MANIFEST).exists():
        remove(disk, directory, path.name)
        log.info(f"removed the unfinished {path.name}")


def sweep_copying(disk: Disk, directory: Path) -> None:
    """Remove links that a killed process was copying from: they hold the blocks of deleted checkpoints."""
    copying = directory / COPYING
    for path in list(copying.iterdir()) if is_real_directory(copying) else []:
        discard(disk, path)
    discard(disk, copying)


def write_with(disk: Disk, path: Path, pace: float, fill: Callable[[HashingFile], None]) -> FileEntry:
    """A file that ``fill`` writes, durable, with the size and hash of what was written."""
    file = HashingFile(disk, path, pace)
    try:
        fill(file)
    except BaseException:
        file.abort()
        raise
    file.close()
    return FileEntry(bytes=file.bytes, sha256=file.sha256)


def _write_record(disk: Disk, partial: Path, rank: int, content: dict[str, object]) -> None:
    unfinished = partial / (record_name(rank) + PARTIAL)
    write_file(disk, unfinished, json.dumps(content).encode())
    disk.rename(unfinished, partial / record_name(rank))  # whoever sees it sees all of it


def publish(disk: Disk, directory: Path, tag: str) -> None:
    """``<tag>.tmp`` is complete: it becomes ``<tag>``, in the place of an older one."""
    if (directory / tag).exists():
        disk.sync_directory(directory)  # the new one is there to be finished before the old one goes
        if role_of(tag) == "rolling" and not _completes(directory / (tag + PARTIAL), directory / tag):
            supersede(disk, directory, tag)
        remove(disk, directory, tag)
    disk.rename(directory / (tag + PARTIAL), directory / tag)
    disk.sync_directory(directory)


def _move_pointer(disk: Disk, directory: Path, name: str, tag: str) -> None:
    write_file(disk, directory / (name + PARTIAL), tag.encode())
    disk.rename(directory / (name + PARTIAL), directory / name)


def discard(disk: Disk, path: Path) -> None:
    """Delete a directory that is no checkpoint, and the files in it; of a link, the link."""
    if path.is_symlink():
        disk.unlink(path)
        return
    if not path.is_dir():
        return
    for child in path.iterdir():
        disk.unlink(child)
    disk.remove_directory(path)


def _is_complete(partial: Path) -> bool:
    try:
        manifest = read(partial)
    except DamagedError:
        return False
    return all(size_problem_of(partial, name, entry) is None for name, entry in manifest.files.items())


def _is_spare(checkpoint: Path, other: Path) -> bool:
    """Whether ``other`` is the same, or whole where ``checkpoint`` has weights only."""
    try:
        mine, others = read(checkpoint), read(other)
    except DamagedError:
        return False
    return mine == others or (mine.kind == "weights" and others.kind == "full")


def _completes(new: Path, old: Path) -> bool:
    """Whether ``new`` is the same state as ``old``, whose evaluation was interrupted."""
    try:
        before, after = read(old), read(new)
    except DamagedError:
        return False
    same = all(before.state.get(key) == after.state.get(key) for key in _SAME_STATE)
    return same and not before.is_evaluated and before.identity == after.identity


def _make_durable(disk: Disk, partial: Path) -> None:
    for path in partial.iterdir():
        with open(path, "rb", opener=regular_only) as file:
            disk.sync(file)
    disk.sync_directory(partial)


def _link_or_copy(disk: Disk, source: Path, target: Path) -> None:
    try:
        disk.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(source, "rb", opener=regular_only) as file:  # a file system without hard links
            write_with(disk, target, 0.0, lambda out: _copy(file.read, out.write))


def _copy(read_some: Callable[[int], bytes], write: Callable[[bytes], int]) -> None:
    while block := read_some(1 << 22):
        write(block)
