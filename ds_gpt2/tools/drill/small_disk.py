"""A disk that may be filled: a small file system in memory, which only the processes of one start see.

Mounting it needs root, or a kernel that lets a user be root in a namespace of his own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from ds_gpt2.checkpoint.catalog import Generation, candidates

FILLER = "filler"
_ROOM_FOR = 5  # checkpoints: the one to go on from, those of the scene, and one that is being written


@functools.cache
def namespace() -> tuple[str, ...] | None:
    """The command that gives what follows it mounts of its own; None where nothing of the kind works."""
    ways = [("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")]
    for way in ways if os.geteuid() == 0 else ways[1:]:
        attempt = [*way, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
        try:
            if subprocess.run(attempt, capture_output=True, timeout=10).returncode == 0:
                return way
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def size_for(checkpoint_bytes: int) -> int | None:
    """Bytes of a file system for a few checkpoints; None where the memory is too short for it."""
    return _if_in_memory(_ROOM_FOR * checkpoint_bytes + 2**20)


def size_for_run(run_dir: Path) -> int | None:
    """Bytes of a file system for a run's directory; None if there is not enough memory for it."""
    return _if_in_memory(2 * sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()) + 2**23)


def _if_in_memory(size: int) -> int | None:
    return size if 3 * size < psutil.virtual_memory().available else None


def move_in(directory: Path, staging: Path, size: int, generation: Generation) -> None:
    """From here on ``directory`` is a file system of ``size`` bytes, with ``generation`` alone in it.

    Args:
        staging: an empty directory, where the file system is seen too.

    Raises:
        CalledProcessError: it cannot be mounted.
    """
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(staging)], check=True)
    shutil.copytree(generation.path, staging / generation.tag)
    subprocess.run(["mount", "--bind", str(staging), str(directory)], check=True)


def move_out(directory: Path, staging: Path) -> None:
    """``directory`` is what it was, and has in addition the rolling checkpoints that were made meanwhile.

    Raises:
        CalledProcessError: it cannot be unmounted.
    """
    subprocess.run(["umount", str(directory)], check=True)
    for made in staging.glob("rolling_step_*[0-9]"):
        if not (directory / made.name).exists():
            shutil.copytree(made, directory / (made.name + ".moved"))
            (directory / (made.name + ".moved")).rename(directory / made.name)


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[None]:
    """``directory`` is a file system of ``size`` bytes with the same files; what is in it at the end is copied back.

    Raises:
        CalledProcessError: it cannot be mounted.
    """
    below = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    real = Path(f"/proc/self/fd/{below}")  # the mount hides it from its path
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], check=True)
    shutil.copytree(real, directory, dirs_exist_ok=True)
    try:
        yield
    finally:
        shutil.copytree(directory, real, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILLER))
        os.close(below)


def fill(directory: Path) -> Path:
    """Leave just so much on the file system of ``directory`` that the next checkpoint seems to fit, but does not.

    Its files do; the manifest, the records and the ends of blocks are too much. With less room older checkpoints would
    give way to it. Returns the file that takes up the rest, to be deleted; may be called again and again.
    """
    history = candidates(directory, "latest")
    newest = history[0].manifest.bytes if history and history[0].manifest is not None else 0
    return _fill_but(directory, newest // os.statvfs(directory).f_frsize + 2)


def fill_up(directory: Path) -> Path:
    """Leave nothing on the file system of ``directory``; otherwise like ``fill``."""
    return _fill_but(directory, 0)


def _fill_but(directory: Path, blocks: int) -> Path:
    filler = directory / FILLER
    with filler.open("ab") as file:
        disk = os.statvfs(directory)
        spare = disk.f_bavail - blocks
        if spare > 0:
            os.posix_fallocate(file.fileno(), file.tell(), spare * disk.f_frsize)
    return filler
