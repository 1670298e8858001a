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
class Room:
    """One disk that a run writes to."""

    directories: tuple[str, ...]
    free_bytes: int
    needed_bytes: int | None  # to the run's end, and to be left free; None where not known
    days_left: float | None  # until it is full; None where it is enough to the end, or that is not known
    problem: str | None = None  # why nothing can be written to it now


@dataclass(frozen=True)
class Course:
    """Where a run is, and what it has to go."""

    step: int  # above 0
    steps: int
    seconds_per_step: float
    epochs_per_step: float


def look(run_dir: Path, settings: Settings, found: Sequence[Generation], course: Course | None) -> list[Room]:
    """The disks of a run's directories, the first that will be full first.

    Args:
        found: the run's checkpoints.
        course: None where not known: then the free space alone is told.
    """
    events = settings.tensorboard_dir
    directories = [run_dir, settings.checkpoint_dir, *([] if events.is_relative_to(run_dir) else [events])]
    growths = None if course is None else _growths(directories, settings, found, course)
    disks: dict[int, list[Path]] = {}
    for directory in directories:
        with contextlib.suppress(OSError):  # not made yet
            disks.setdefault(directory.stat().st_dev, []).append(directory)
    rooms = [_room(sharing, growths, course) for sharing in disks.values()]
    return sorted(rooms, key=lambda room: (math.inf if room.days_left is None else room.days_left, room.free_bytes))


def _room(sharing: Sequence[Path], growths: Mapping[Path, Growth] | None, course: Course | None) -> Room:
    names, free = tuple(map(str, sharing)), shutil.disk_usage(sharing[0]).free
    problem = _problem_of(sharing[0])
    if growths is None or course is None:
        return Room(names, free, None, None, problem)

    def needed(step: int) -> int:
        return math.ceil(sum(growths[directory](step) for directory in sharing))

    if needed(course.steps) <= free:
        return Room(names, free, needed(course.steps), None, problem)
    fits, too_much = course.step, course.steps
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        fits, too_much = (middle, too_much) if needed(middle) <= free else (fits, middle)
    days_left = (fits - course.step) * course.seconds_per_step / _DAY
    return Room(names, free, needed(course.steps), days_left, problem)


def _problem_of(directory: Path) -> str | None:
    disk = os.statvfs(directory)
    if disk.f_flag & os.ST_RDONLY:
        return "is read-only"
    if disk.f_blocks and not disk.f_bavail:
        return "is full"
    return "has no free inodes" if disk.f_files and not disk.f_favail else None


def _growths(
    directories: Sequence[Path], settings: Settings, found: Sequence[Generation], course: Course
) -> dict[Path, Growth] | None:
    """By directory; None before a first checkpoint shows how large they are."""
    size = next((one.manifest.bytes for one in found if one.manifest is not None and not one.weights_only), None)
    if size is None:
        return None
    growths = {directory: _steady(_bytes_below(directory) / course.step, course.step) for directory in directories}
    present = _bytes_below(settings.checkpoint_dir)
    growths[settings.checkpoint_dir] = of_checkpoints(settings.checkpoint, found, size, present, course)
    return growths


def _steady(bytes_per_step: float, begun: int) -> Growth:
    return lambda step: bytes_per_step * (step - begun)


def of_checkpoints(
    settings: CheckpointSettings, found: Sequence[Generation], size: int, present: int, course: Course
) -> Growth:
    """At most: as if no two of those that are kept shared their files.

    Args:
        size: bytes of a whole checkpoint.
        present: bytes of all that are there.
    """
    counts = {role: sum(one.role == role for one in found) for role in ("rolling", "superseded", "epoch")}
    every = settings.every or course.steps
    kept_every = math.lcm(every, settings.keep_every) if settings.keep_every else 0
    most_epochs = math.inf if settings.keep_epochs == "all" else settings.keep_epochs
    epoch_size = size * (_WEIGHTS_SHARE if settings.epochs_as == "weights" else 1)
    best_size = size * (_WEIGHTS_SHARE if settings.best_as == "weights" else 1) * settings.keep_best

    def growth(step: int) -> float:
        saves = step // every - course.step // every
        rolling = min(settings.keep_last, counts["rolling"] + counts["superseded"] + saves)
        for_good = step // kept_every if kept_every else 0
        epochs = min(most_epochs, counts["epoch"] + _epochs(course, step) - _epochs(course, course.step))
        being_written = size + settings.min_free_gb * 1e9
        return max(0.0, (rolling + for_good) * size + epochs * epoch_size + best_size - present) + being_written

    return growth


def _epochs(course: Course, step: int) -> int:
    """That are complete after ``step``."""
    return int(step * course.epochs_per_step + 1e-6)


def _bytes_below(directory: Path) -> int:
    """Of all files, those with several names once."""
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                status = os.lstat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
