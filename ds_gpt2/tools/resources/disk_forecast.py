"""Will the disks do to the run's end? By what a step writes, and by what retention lets the checkpoints come to."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.config.settings import CheckpointSettings, Settings

_WEIGHTS_SHARE = 4 / 14  # bytes a parameter: fp32 weights alone, and a whole checkpoint
_DAY = 86_400.0

Growth = Callable[[int], float]  # bytes that are written, beyond what is there, until a step is done


@dataclass(frozen=True)
class DiskSpace:
    """One disk that a run writes to."""

    directories: tuple[str, ...]
    free_bytes: int
    needed_bytes: int | None  # to the run's end, and to be left free; None where not known
    days_left: float | None  # until it is full; None where it is enough to the end, or that is not known
    problem: str | None = None  # why nothing can be written to it now


@dataclass(frozen=True)
class RunProgress:
    """Where a run is, and what it has to go."""

    step: int  # above 0
    steps: int
    seconds_per_step: float
    epochs_per_step: float


def look(
    run_dir: Path, settings: Settings, found: Sequence[Generation], progress: RunProgress | None
) -> list[DiskSpace]:
    """The disks of a run's directories, the first that will be full first.

    Args:
        found: the run's checkpoints.
        progress: None where not known: then only the free space is known.
    """
    events = settings.tensorboard_dir
    directories = [run_dir, settings.checkpoint_dir, *([] if events.is_relative_to(run_dir) else [events])]
    growths = None if progress is None else _growths(directories, settings, found, progress)
    sharing: dict[int, list[Path]] = {}
    for directory in directories:
        with contextlib.suppress(OSError):  # not made yet
            sharing.setdefault(directory.stat().st_dev, []).append(directory)
    disks = [_space_of(directories, growths, progress) for directories in sharing.values()]
    return sorted(disks, key=lambda disk: (math.inf if disk.days_left is None else disk.days_left, disk.free_bytes))


def _space_of(
    sharing: Sequence[Path], growths: Mapping[Path, Growth] | None, progress: RunProgress | None
) -> DiskSpace:
    names, free = tuple(map(str, sharing)), shutil.disk_usage(sharing[0]).free
    problem = _problem_of(sharing[0])
    if growths is None or progress is None:
        return DiskSpace(names, free, None, None, problem)

    def needed(step: int) -> int:
        return math.ceil(sum(growths[directory](step) for directory in sharing))

    if needed(progress.steps) <= free:
        return DiskSpace(names, free, needed(progress.steps), None, problem)
    fits, too_much = progress.step, progress.steps
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        fits, too_much = (middle, too_much) if needed(middle) <= free else (fits, middle)
    days_left = (fits - progress.step) * progress.seconds_per_step / _DAY
    return DiskSpace(names, free, needed(progress.steps), days_left, problem)


def _problem_of(directory: Path) -> str | None:
    disk = os.statvfs(directory)
    if disk.f_flag & os.ST_RDONLY:
        return "is read-only"
    if disk.f_blocks and not disk.f_bavail:
        return "is full"
    return "has no free inodes" if disk.f_files and not disk.f_favail else None


def _growths(
    directories: Sequence[Path], settings: Settings, found: Sequence[Generation], progress: RunProgress
) -> dict[Path, Growth] | None:
    """By directory; None before a first checkpoint shows how large they are."""
    size = next((one.manifest.bytes for one in found if one.manifest is not None and not one.weights_only), None)
    if size is None:
        return None
    growths = {directory: _steady(_bytes_below(directory) / progress.step, progress.step) for directory in directories}
    present = _bytes_below(settings.checkpoint_dir)
    growths[settings.checkpoint_dir] = of_checkpoints(settings.checkpoint, found, size, present, progress)
    return growths


def _steady(bytes_per_step: float, begun: int) -> Growth:
    return lambda step: bytes_per_step * (step - begun)


def of_checkpoints(
    settings: CheckpointSettings, found: Sequence[Generation], size: int, present: int, progress: RunProgress
) -> Growth:
    """At most: as if no two of those that are kept shared their files.

    Args:
        size: bytes of a whole checkpoint.
        present: bytes of all that are there.
    """
    counts = {role: sum(one.role == role for one in found) for role in ("rolling", "superseded", "epoch")}
    every = settings.every or progress.steps
    kept_every = math.lcm(every, settings.keep_every) if settings.keep_every else 0
    most_epochs = math.inf if settings.keep_epochs == "all" else settings.keep_epochs
    epoch_size = size * (_WEIGHTS_SHARE if settings.epochs_as == "weights" else 1)
    best_size = size * (_WEIGHTS_SHARE if settings.best_as == "weights" else 1) * settings.keep_best

    def growth(step: int) -> float:
        saves = step // every - progress.step // every
        rolling = min(settings.keep_last, counts["rolling"] + counts["superseded"] + saves)
        for_good = step // kept_every if kept_every else 0
        epochs = min(most_epochs, counts["epoch"] + _epochs(progress, step) - _epochs(progress, progress.step))
        being_written = size + settings.min_free_gb * 1e9
        return max(0.0, (rolling + for_good) * size + epochs * epoch_size + best_size - present) + being_written

    return growth


def _epochs(progress: RunProgress, step: int) -> int:
    """That are complete after ``step``."""
    return int(step * progress.epochs_per_step + 1e-6)


def _bytes_below(directory: Path) -> int:
    """Of all files, those with several names once."""
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                status = os.lstat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
