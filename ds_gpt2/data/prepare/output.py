"""The directory that a preparation writes to, and how it becomes the dataset that was asked for.

A directory that does not exist yet is made beside its name, as ``NAME.unfinished``, and renamed when it is whole. One
that exists, and is empty, stays: it may be a mount point, or the target of a link. It is filled from ``.unfinished``
within it, its index last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_gpt2.common import files, safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import remove_tree, replace_file
from ds_gpt2.common.formatting import size
from ds_gpt2.data.dataset import INDEX, UNFINISHED, Shard

NOTE, _LOCK = "progress.json", "lock"
_NEW_DISK = "lost+found"  # what an empty file system has in it


def workplace(out: Path) -> Path:
    """Return the directory in which ``out`` is prepared."""
    target = _target(out)
    beside = target.with_name(target.name + UNFINISHED) if target.name else target / UNFINISHED
    return target / UNFINISHED if target.is_dir() and not beside.is_dir() else beside


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Make the directory that will be ``out``, for this process alone.

    It is removed after an error if there is nothing in it to continue from.

    Raises:
        UserError: ``out`` exists and is not empty, another process is at it, or it cannot be made.
    """
    try:
        directory, target = workplace(out), _target(out)
        if _is_taken(target, directory):
            raise UserError(f"{out} exists already and is no empty directory: remove it, or give another --out DIR")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    with files.lock(directory / _LOCK, f"{directory}"):
        try:
            _take_back(directory, target)
            yield directory
        except UserError:
            if directory.exists() and not any(_is_worth_keeping(path.name) for path in directory.iterdir()):
                shutil.rmtree(directory)
            raise


def publish(directory: Path, out: Path, shards: list[Shard], index: str) -> None:
    """Give a whole dataset its index and its name; what else lies there is removed.

    Raises:
        UserError: it cannot be moved; the same command continues from the last note.
    """
    target = _target(out)
    replace_file(directory / INDEX, index, durable=True)
    wanted = {INDEX, NOTE, _LOCK, *(shard.file for shard in shards)}
    for other in directory.iterdir():
        if other.name not in wanted:
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
            _take_back(directory, target)
        raise UserError(
            f"the dataset is complete in {directory} but cannot be moved to {out} ({error.strerror}): fix that and run"
            " the same command again, or use it where it is"
        ) from None


def check_room(directory: Path, needed: float, what: str) -> None:
    """
    Raises:
        UserError: the disk has not ``needed`` bytes for ``what``.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory.parent} has {size(free)} free, some {size(int(needed))} are needed for {what}: make room,"
            " give --out on another disk, or fewer --tokens"
        )


def _target(out: Path) -> Path:
    """Where ``out`` really is: a link stays, and what it leads to is written."""
    return Path(os.path.realpath(out)) if out.is_symlink() or ".." in out.parts else out.absolute()


def _is_taken(target: Path, directory: Path) -> bool:
    """Whether something else than this preparation is there."""
    if not target.is_dir():
        return os.path.lexists(target)
    ours = {UNFINISHED, *_shards_of(directory)} if directory.parent == target else set()
    return any(path.name not in ours and not _is_new_disk(path) for path in target.iterdir())


def _is_new_disk(path: Path) -> bool:
    return path.name == _NEW_DISK and path.is_dir()


def _is_worth_keeping(name: str) -> bool:
    """Whether a preparation can continue from it; without a note, not from what was written of a shard."""
    return name != _LOCK and not name.endswith(f".bin{UNFINISHED}")


def _rename(directory: Path, target: Path) -> None:
    if target.exists():  # empty
        target.rmdir()
    directory.rename(target)
    for name in (NOTE, _LOCK):
        (target / name).unlink(missing_ok=True)


def _move_out(directory: Path, target: Path, shards: list[Shard]) -> None:
    for shard in shards:
        (directory / shard.file).rename(target / shard.file)
    files.sync_directory(target)
    (directory / INDEX).rename(target / INDEX)  # from here on it is the dataset
    files.sync_directory(target)
    shutil.rmtree(directory, ignore_errors=True)  # NFS keeps the lock, which is open, under another name


def _take_back(directory: Path, target: Path) -> None:
    """Undo a move that was interrupted."""
    for name in _shards_of(directory) if directory.parent == target else ():
        if (target / name).exists() and not (directory / name).exists():
            (target / name).rename(directory / name)


def _shards_of(directory: Path) -> list[str]:
    """Names of the shards, if all of them were there before."""
    try:
        index = safe_json.read(directory / INDEX)
        return [Path(shard["file"]).name for shard in index["shards"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
