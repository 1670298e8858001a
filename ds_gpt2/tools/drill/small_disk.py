"""Small file systems in memory that a scene can fill. Only the processes of one start see them.

Mounting them needs root, or a kernel that allows user namespaces.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.checkpoint.catalog import Generation, candidates

FILLER = "filler"
_CHECKPOINTS = 5  # that fit: the one to resume from, those of the scene, and one being written


@dataclass(frozen=True)
class SmallDisks:
    """The small file systems of one start; sizes in bytes, 0 for none."""

    command: Sequence[str] = ()  # prefix that runs a command in its own mount namespace
    checkpoints: int = 0
    run_dir: int = 0


def for_checkpoints(checkpoint_bytes: int) -> SmallDisks | None:
    """Return a small disk for a few checkpoints; None if it cannot be mounted, or there is not enough memory."""
    size, command = _CHECKPOINTS * checkpoint_bytes + 2**20, namespace_command()
    return SmallDisks(command, checkpoints=size) if command is not None and _fits_in_memory(size) else None


def for_run_dir(run_dir: Path) -> SmallDisks | None:
    """Return a small disk for a run's directory; None if it cannot be mounted, or there is not enough memory."""
    size = 2 * sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()) + 2**23
    command = namespace_command()
    return SmallDisks(command, run_dir=size) if command is not None and _fits_in_memory(size) else None


@functools.cache
def namespace_command() -> tuple[str, ...] | None:
    """Return the prefix that runs a command in its own mount namespace; None if the machine does not allow it."""
    prefixes = [("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")]
    for prefix in prefixes if os.geteuid() == 0 else prefixes[1:]:
        attempt = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
        try:
            if subprocess.run(attempt, capture_output=True, timeout=10).returncode == 0:
                return prefix
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _fits_in_memory(size: int) -> bool:
    return 3 * size < psutil.virtual_memory().available


@contextlib.contextmanager
def mounted_on_checkpoints(directory: Path, staging: Path, size: int, generation: Generation) -> Iterator[None]:
    """Mount a small disk of ``size`` bytes on ``directory``; at first it holds only ``generation``.

    After unmounting, the rolling checkpoints that were made on it are copied to ``directory``.

    Args:
        staging: an empty directory, through which the small disk remains visible.

    Raises:
        CalledProcessError: the small disk cannot be mounted or unmounted.
    """
    _mount_tmpfs(staging, size)
    shutil.copytree(generation.path, staging / generation.tag)
    subprocess.run(["mount", "--bind", str(staging), str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)
        for made in staging.glob("rolling_step_*[0-9]"):
            if not (directory / made.name).exists():
                shutil.copytree(made, directory / (made.name + ".moved"))
                (directory / (made.name + ".moved")).rename(directory / made.name)


@contextlib.contextmanager
def mounted_on_run_dir(directory: Path, size: int) -> Iterator[None]:
    """Mount a small disk of ``size`` bytes with the same files on ``directory``; copy its files back at the end.

    Raises:
        CalledProcessError: the small disk cannot be mounted.
    """
    below = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    original = Path(f"/proc/self/fd/{below}")  # the mount hides the original directory from its path
    _mount_tmpfs(directory, size)
    shutil.copytree(original, directory, dirs_exist_ok=True)
    try:
        yield
    finally:
        shutil.copytree(directory, original, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILLER))
        os.close(below)


def _mount_tmpfs(directory: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Fill the file system of ``directory`` so that the next checkpoint seems to fit, but does not.

    There is space for the files of a checkpoint, but not for manifest, records and partly filled blocks. With less
    space, older checkpoints would be deleted first. May be called repeatedly.

    Returns:
        The file that occupies the space; delete it to free the space.
    """
    history = candidates(directory, "latest")
    newest = history[0].manifest.bytes if history and history[0].manifest is not None else 0
    return _fill_all_but(directory, newest // os.statvfs(directory).f_frsize + 2)


def fill_up(directory: Path) -> Path:
    """Fill the file system of ``directory`` completely; otherwise like ``fill``."""
    return _fill_all_but(directory, 0)


def _fill_all_but(directory: Path, blocks: int) -> Path:
    filler = directory / FILLER
    with filler.open("ab") as file:
        disk = os.statvfs(directory)
        spare = disk.f_bavail - blocks
        if spare > 0:
            os.posix_fallocate(file.fileno(), file.tell(), spare * disk.f_frsize)
    return filler
