"""The unfinished directory of a preparation, and its publication as the requested dataset.

If ``NAME`` does not exist, ``NAME.unfinished`` is created beside it and renamed when it is complete. If ``NAME`` is an
empty directory, it is retained, because it may be a mount point or the target of a link: the files are written to
``NAME/.unfinished`` and then moved to ``NAME``, the index last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_gpt2.common import files, locks, safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import remove_tree, replace_file
from ds_gpt2.common.formatting import size
from ds_gpt2.data.dataset import INDEX, UNFINISHED, Shard

PROGRESS_FILE, _LOCK = "progress.json", "lock"
_NEW_DISK = "lost+found"  # directory of an empty file system


def unfinished_directory(out: Path) -> Path:
    """Return the directory in which ``out`` is prepared."""
    target = _target(out)
    beside = target.with_name(target.name + UNFINISHED) if target.name else target / UNFINISHED
    return target / UNFINISHED if target.is_dir() and not beside.is_dir() else beside


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Create and lock the unfinished directory of ``out``.

    After an error it is removed if it has nothing to continue from.

    Raises:
        UserError: ``out`` exists and is not empty, another process prepares it, or it cannot be created.
    """
    try:
        directory, target = unfinished_directory(out), _target(out)
        if _is_taken(target, directory):
            if not target.is_dir():
                raise UserError(f"{out} is not a directory: give --out DIR, one that does not exist or is empty")
            raise UserError(f"{out} already exists and is not an empty directory: remove it, or give another --out DIR")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    with locks.lock(directory / _LOCK, f"{directory}"):
        try:
            _move_back(directory, target)
            yield directory
        except UserError:
            if directory.exists() and not any(_is_useful(path.name) for path in directory.iterdir()):
                shutil.rmtree(directory)
            raise


def publish(directory: Path, out: Path, shards: list[Shard], index: str) -> None:
    """Write the index of a complete dataset, remove other files, and move it to ``out``.

    Raises:
        UserError: it cannot be moved; the same command tries again.
    """
    target = _target(out)
    replace_file(directory / INDEX, index, durable=True)
    retained = {INDEX, PROGRESS_FILE, _LOCK, *(shard.file for shard in shards)}
    for other in directory.iterdir():
        if other.name not in retained:
            remove_tree(other)
    files.sync_directory(directory)
    try:
        if directory.parent == target:
            _move_out(directory, target, shards)
        else:
            _rename(directory, target)
        files.sync_directory(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            _move_back(directory, target)
        raise UserError(
            f"the dataset is complete in {directory} but cannot be moved to {out} ({error.strerror}): fix this and run"
            f" the same command again, or use {directory}"
        ) from None


def check_free_space(directory: Path, needed: float, what: str) -> None:
    """Check that the disk of ``directory`` has ``needed`` bytes for ``what``.

    Raises:
        UserError: it does not.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory.parent} has {size(free)} free, but {what} need about {size(int(needed))}: free some space,"
            " give --out on another disk, or fewer --tokens"
        )


def _target(out: Path) -> Path:
    """Return the directory to write: for a link, its target."""
    return Path(os.path.realpath(out)) if out.is_symlink() or ".." in out.parts else out.absolute()


def _is_taken(target: Path, directory: Path) -> bool:
    """Return whether ``target`` has content that is not of this preparation."""
    if not target.is_dir():
        return os.path.lexists(target)
    ours = {UNFINISHED, *_shards_of(directory)} if directory.parent == target else set()
    return any(path.name not in ours and not _is_new_disk(path) for path in target.iterdir())


def _is_new_disk(path: Path) -> bool:
    return path.name == _NEW_DISK and path.is_dir()


def _is_useful(name: str) -> bool:
    """Return whether a preparation can continue from this file; an unfinished shard does not suffice."""
    return name != _LOCK and not name.endswith(f".bin{UNFINISHED}")


def _rename(directory: Path, target: Path) -> None:
    if target.exists():  # empty
        target.rmdir()
    directory.rename(target)
    for name in (PROGRESS_FILE, _LOCK):
        (target / name).unlink(missing_ok=True)


def _move_out(directory: Path, target: Path, shards: list[Shard]) -> None:
    for shard in shards:
        (directory / shard.file).rename(target / shard.file)
    files.sync_directory(target)
    (directory / INDEX).rename(target / INDEX)  # this completes the dataset
    files.sync_directory(target)
    shutil.rmtree(directory, ignore_errors=True)  # NFS keeps the open lock under another name


def _move_back(directory: Path, target: Path) -> None:
    """Undo a move that was interrupted."""
    for name in _shards_of(directory) if directory.parent == target else ():
        if (target / name).exists() and not (directory / name).exists():
            (target / name).rename(directory / name)


def _shards_of(directory: Path) -> list[str]:
    """Return the names of the shards in the index; none if there is no index yet."""
    try:
        index = safe_json.read(directory / INDEX)
        return [Path(shard["file"]).name for shard in index["shards"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
