"""The commit protocol: checkpoints are created, replaced and deleted atomically, also if the power fails at any time.

1. Each rank writes its files into ``<tag>.tmp/``, syncs each, and writes its record: the sizes and hashes of its files.
2. When all records exist, rank 0 writes and syncs the manifest, then syncs the directory.
3. Rank 0 renames the directory to ``<tag>`` and syncs its parent: from now on the checkpoint exists.
4. Rank 0 replaces ``latest_backup`` and ``latest`` by rename and syncs the parent.

A checkpoint is deleted in the reverse order: its manifest first. Functions that write raise OSError.
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
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV})


def record_name(rank: int) -> str:
    """Return the name of the file that lists the files of ``rank`` before the commit."""
    return f"rank_{rank:05d}.json"


def write_record(disk: Disk, partial: Path, rank: int, files: dict[str, FileEntry]) -> None:
    """Record that all files of ``rank`` are written and synced, with their sizes and hashes."""
    _write_record(disk, partial, rank, {"files": {name: entry.model_dump() for name, entry in files.items()}})


def write_failure(disk: Disk, partial: Path, rank: int, reason: str) -> None:
    """Record that ``rank`` could not write its files and why, so that rank 0 does not wait for them."""
    _write_record(disk, partial, rank, {"failed": reason})


def read_record(partial: Path, rank: int) -> dict[str, FileEntry] | None:
    """Return the files of ``rank`` by name; None while it is still writing.

    Raises:
        OSError: the rank could not write its files; the message contains the reason.
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
    """Turn ``<tag>.tmp``, which contains a record of every rank, into the checkpoint ``tag``.

    Raises:
        OSError: the checkpoint was not written, or may not be durable.
    """
    partial = directory / (tag + PARTIAL)
    for rank in range(manifest.world_size):
        disk.unlink(partial / record_name(rank))
    write_file(disk, partial / MANIFEST, encode(manifest))
    disk.sync_directory(partial)
    publish(disk, directory, tag)


def replace_manifest(disk: Disk, checkpoint: Path, manifest: Manifest) -> None:
    """Replace the manifest of a committed checkpoint by one with the same files, atomically and durably.

    Other tags of the same checkpoint keep the old one.
    """
    unfinished = checkpoint / (MANIFEST + PARTIAL)
    write_file(disk, unfinished, encode(manifest))
    disk.rename(unfinished, checkpoint / MANIFEST)
    disk.sync_directory(checkpoint)


def point_to(disk: Disk, directory: Path, tag: str) -> None:
    """Make ``latest`` name ``tag``, and ``latest_backup`` the previous tag of ``latest``."""
    before = read_pointer(directory, LATEST)
    if before is not None and before != tag and (directory / before / MANIFEST).exists():
        _move_pointer(disk, directory, LATEST_BACKUP, before)
    _move_pointer(disk, directory, LATEST, tag)
    disk.sync_directory(directory)


def read_pointer(directory: Path, name: str) -> str | None:
    """Return the tag that the file ``latest`` or ``latest_backup`` names; None if it contains no tag."""
    try:
        tag = read_small(directory / name).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None  # only users and DeepSpeed's tools rely on the pointers: a resume scans the checkpoints
    return tag if role_of(tag) else None


def link(disk: Disk, source: Path, directory: Path, tag: str, expected: Manifest | None = None) -> None:
    """Create the checkpoint ``tag`` with the files of the one in ``source``: hard links, or copies if unsupported.

    An existing checkpoint ``tag`` is replaced; if it is a rolling one, it is superseded.

    Args:
        expected: of the checkpoint that is meant: ``source`` may be replaced by another one at any time.

    Raises:
        OSError: a file cannot be linked or copied.
        DamagedError: the manifest in ``source`` cannot be read, or is not that of the expected checkpoint.
    """
    partial = directory / (tag + PARTIAL)
    discard(disk, partial)
    disk.make_directory(partial)
    for name in read(source).files if expected is None else expected.files:
        _link_or_copy(disk, source / name, partial / name)
    if expected is None:  # the commit marker last
        _link_or_copy(disk, source / MANIFEST, partial / MANIFEST)
    else:  # a link could be to the manifest of a later checkpoint
        write_file(disk, partial / MANIFEST, encode(_read_expected(source, partial, expected)))
    disk.sync_directory(partial)
    publish(disk, directory, tag)


def has_same_files(one: Manifest, other: Manifest) -> bool:
    """Return whether both are manifests of one checkpoint; its evaluation may be recorded in only one of them."""
    return one.step == other.step and one.files == other.files


def _read_expected(source: Path, partial: Path, expected: Manifest) -> Manifest:
    """Return the manifest in ``source``. The files in ``partial`` were linked before, so they are those it lists.

    Raises:
        DamagedError: it is not that of the expected checkpoint, or a file has another size.
    """
    found = read(source)
    if not has_same_files(found, expected):
        raise DamagedError(f"another checkpoint, of step {found.step}, has replaced that of step {expected.step}")
    sizes = (size_problem_of(partial, name, entry) for name, entry in found.files.items())
    if (problem := next((each for each in sizes if each is not None), None)) is not None:
        raise DamagedError(problem)
    return found


def supersede(disk: Disk, directory: Path, tag: str) -> None:
    """Rename a checkpoint that is no longer part of the run's history to ``superseded_step_<step>``.

    It is retained because a user may want to resume from it. It is deleted instead if it is only another tag of a
    checkpoint that exists, or if it is too damaged to determine its step.
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
    """Delete the checkpoint ``tag`` if it exists, its manifest first: a partly deleted checkpoint is not valid."""
    path = directory / tag
    if path.is_symlink():
        disk.unlink(path)
        return
    if not path.is_dir():
        return
    with contextlib.suppress(FileNotFoundError):  # another process deletes it as well
        disk.unlink(path / MANIFEST)
        disk.sync_directory(path)
        discard(disk, path)


def discard_failed_commit(disk: Disk, directory: Path, tag: str) -> None:
    """Delete ``<tag>.tmp`` after a failed ``commit``.

    It is retained if it is complete and ``tag`` does not exist: the next start finishes the commit.
    """
    partial = directory / (tag + PARTIAL)
    if (directory / tag / MANIFEST).exists() or not _is_complete(partial):
        remove(disk, directory, partial.name)


def sweep(disk: Disk, directory: Path) -> None:
    """Clean up after a crash, before a run resumes: finish complete commits, delete incomplete ones, and log each.

    Only files and directories that this project has created are changed. Files of a killed process may not be durable
    yet: they are synced before they are used.
    """
    if not directory.is_dir():
        return
    disk.sync_directory(directory)
    for path in sorted(directory.iterdir()):
        try:
            _sweep_one(disk, directory, path)
        except OSError as error:  # continue with the others
            log.warning(f"could not clean up {path}: {error}")
    sweep_copying(disk, directory)


def has_unfinished_commit(directory: Path) -> bool:
    """Return whether ``directory`` has a complete checkpoint that is not committed yet. ``sweep`` would finish it."""
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
        if path.name != tag:  # this project never writes through a symbolic link
            disk.unlink(path)
            log.info(f"removed the symbolic link {path.name}")
    elif path.name != tag and _is_complete(path):
        _make_durable(disk, path)
        publish(disk, directory, tag)
        log.info(f"finished the commit of {tag}")
    elif path.name != tag or not (path / MANIFEST).exists():
        remove(disk, directory, path.name)
        log.info(f"removed the unfinished {path.name}")


def sweep_copying(disk: Disk, directory: Path) -> None:
    """Delete the links for backups that a killed process has left: they occupy the space of deleted checkpoints."""
    copying = directory / COPYING
    for path in list(copying.iterdir()) if is_real_directory(copying) else []:
        discard(disk, path)
    discard(disk, copying)


def write_with(disk: Disk, path: Path, bytes_per_second: float, fill: Callable[[HashingFile], None]) -> FileEntry:
    """Create a file, let ``fill`` write it, sync it, and return its size and hash.

    Args:
        bytes_per_second: write rate limit; 0 for no limit.
    """
    file = HashingFile(disk, path, bytes_per_second)
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
    disk.rename(unfinished, partial / record_name(rank))  # atomic: rank 0 reads a complete record or none


def publish(disk: Disk, directory: Path, tag: str) -> None:
    """Rename the complete ``<tag>.tmp`` to ``<tag>``; an existing ``<tag>`` is superseded or deleted before."""
    if (directory / tag).exists():
        disk.sync_directory(directory)  # the new checkpoint is durable before the old one is deleted
        if role_of(tag) == "rolling" and not _completes(directory / (tag + PARTIAL), directory / tag):
            supersede(disk, directory, tag)
        remove(disk, directory, tag)
    disk.rename(directory / (tag + PARTIAL), directory / tag)
    disk.sync_directory(directory)


def _move_pointer(disk: Disk, directory: Path, name: str, tag: str) -> None:
    write_file(disk, directory / (name + PARTIAL), tag.encode())
    disk.rename(directory / (name + PARTIAL), directory / name)


def discard(disk: Disk, path: Path) -> None:
    """Delete a directory that is not a committed checkpoint, and the files in it; of a symbolic link, the link."""
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
    """Return whether ``other`` makes ``checkpoint`` redundant: equal, or full where ``checkpoint`` has only weights."""
    try:
        own_manifest, other_manifest = read(checkpoint), read(other)
    except DamagedError:
        return False
    return own_manifest == other_manifest or (own_manifest.kind == "weights" and other_manifest.kind == "full")


def _completes(new: Path, old: Path) -> bool:
    """Return whether ``new`` has the same training state as ``old``, and the evaluation of ``old`` was interrupted."""
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
        if error.errno not in NO_HARD_LINKS:
            raise
        with open(source, "rb", opener=regular_only) as file:  # the file system has no hard links
            write_with(disk, target, 0.0, lambda out: _copy(file.read, out.write))


def _copy(read_block: Callable[[int], bytes], write: Callable[[bytes], int]) -> None:
    while block := read_block(1 << 22):
        write(block)
