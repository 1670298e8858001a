"""Forecast of the free disk space until the end of a run: what a step writes, and what retention keeps."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.space import bytes_for_next_save
from ds_gpt2.common.disk_usage import bytes_below
from ds_gpt2.common.formatting import DAY
from ds_gpt2.config.settings import CheckpointSettings, Settings
from ds_gpt2.model.shape import CHECKPOINT_BYTES, EMA_BYTES, WEIGHT_BYTES
from ds_gpt2.tools.resources.checkpoint_space import max_kept

Growth = Callable[[int], float]  # bytes required until a step is completed, in addition to those on disk now


@dataclass(frozen=True)
class DiskSpace:
    """One disk that a run writes to."""

    directories: tuple[str, ...]
    free_bytes: int
    needed_bytes: int | None  # until the end of the run, the reserve of the last save included; None: not known
    days_left: float | None  # until the disk is full; None: sufficient until the end of the run, or not known
    problem: str | None = None  # why nothing can be written to it now


@dataclass(frozen=True)
class RunProgress:
    """Position of a run in its schedule, and its speed."""

    step: int  # above 0
    steps: int
    seconds_per_step: float
    epochs_per_step: float
    first_step: int = 0  # of a fork: the step of the parent's checkpoint; below ``step``


def forecast_disks(
    run_dir: Path, settings: Settings, found: Sequence[Generation], progress: RunProgress | None
) -> list[DiskSpace]:
    """Return the disks of a run's directories, in the order in which they become full.

    Args:
        found: the run's checkpoints.
        progress: None if not known; then only the free space is filled in.
    """
    events = settings.tensorboard_dir
    directories = [run_dir, settings.checkpoint_dir, *([] if events.is_relative_to(run_dir) else [events])]
    growths = None if progress is None else _growths(directories, settings, found, progress)
    by_device: dict[int, list[Path]] = {}
    for directory in directories:
        with contextlib.suppress(OSError):  # not created yet
            by_device.setdefault(directory.stat().st_dev, []).append(directory)
    disks = [_space_of(directories, growths, progress) for directories in by_device.values()]
    return sorted(disks, key=lambda disk: (math.inf if disk.days_left is None else disk.days_left, disk.free_bytes))


def _space_of(
    directories: Sequence[Path], growths: Mapping[Path, Growth] | None, progress: RunProgress | None
) -> DiskSpace:
    """Return the free space of one disk and how long it lasts.

    Args:
        directories: those on one disk.
    """
    names, free = tuple(map(str, directories)), shutil.disk_usage(directories[0]).free
    problem = _problem_of(directories[0])
    if growths is None or progress is None:
        return DiskSpace(names, free, None, None, problem)

    def needed(step: int) -> int:
        return math.ceil(sum(growths[directory](step) for directory in directories))

    at_end = needed(progress.steps) if progress.step < progress.steps else 0
    if at_end <= free:
        return DiskSpace(names, free, at_end, None, problem)
    sufficient, insufficient = progress.step, progress.steps
    while insufficient - sufficient > 1:
        middle = (sufficient + insufficient) // 2
        sufficient, insufficient = (middle, insufficient) if needed(middle) <= free else (sufficient, middle)
    days_left = (sufficient - progress.step) * progress.seconds_per_step / DAY
    return DiskSpace(names, free, at_end, days_left, problem)


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
    """Return the growth of each directory; None before the first checkpoint, whose size is not known yet."""
    sizes = (one.manifest.bytes for one in found if one.manifest is not None and not one.weights_only)
    checkpoint_bytes = next(sizes, None)
    if checkpoint_bytes is None:
        return None
    own_steps = progress.step - progress.first_step
    growths = {directory: _linear(bytes_below(directory) / own_steps, progress.step) for directory in directories}
    present = bytes_below(settings.checkpoint_dir)
    growths[settings.checkpoint_dir] = growth_of_checkpoints(
        settings.checkpoint, found, checkpoint_bytes, present, progress
    )
    return growths


def _linear(bytes_per_step: float, from_step: int) -> Growth:
    return lambda step: bytes_per_step * (step - from_step)


def growth_of_checkpoints(
    settings: CheckpointSettings,
    found: Sequence[Generation],
    checkpoint_bytes: int,
    present: int,
    progress: RunProgress,
) -> Growth:
    """Return an upper bound of the growth, see ``checkpoint_space.max_kept``.

    Args:
        checkpoint_bytes: bytes of a full checkpoint.
        present: bytes of all checkpoints on disk.
    """
    counts = {role: sum(one.role == role for one in found) for role in ("rolling", "superseded", "epoch")}
    every = settings.every or progress.steps
    full = (one.manifest for one in found if one.manifest is not None and not one.weights_only)
    average = EMA_BYTES * any(manifest.has_ema for manifest in full)
    weights_bytes = checkpoint_bytes * (WEIGHT_BYTES + average) // (CHECKPOINT_BYTES + average)
    next_save = bytes_for_next_save(checkpoint_bytes, settings)

    def growth(step: int) -> float:
        rolling = counts["rolling"] + counts["superseded"] + step // every - progress.step // every
        epochs = counts["epoch"] + _completed_epochs(progress, step) - _completed_epochs(progress, progress.step)
        kept = max_kept(settings, step, rolling, epochs, has_best=True)
        return max(0, kept.bytes(checkpoint_bytes, weights_bytes) - present) + next_save

    return growth


def _completed_epochs(progress: RunProgress, step: int) -> int:
    return int(step * progress.epochs_per_step + 1e-6)
