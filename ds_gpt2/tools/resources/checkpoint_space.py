"""Disk space of a whole run: checkpoints as retention keeps them, logs by the bytes that a step writes.

``simulate`` replays every save of a run whose schedule is known. ``max_kept`` is a closed formula: an upper bound for
callers that know counts only, or need an answer within milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ds_gpt2.checkpoint.directory import policies
from ds_gpt2.checkpoint.naming import BEST_TAG, epoch_tag, rolling_tag
from ds_gpt2.checkpoint.retention import PROTECTED, RetentionCandidate, to_delete
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config.settings import CheckpointSettings
from ds_gpt2.model.shape import CHECKPOINT_BYTES, WEIGHT_BYTES
from ds_gpt2.tools.resources.run_schedule import RunSchedule

_MOST_SAVES = 1_000_000


@dataclass(frozen=True)
class Count:
    """Number of checkpoints that take disk space. Checkpoints of the same step are hard links to the same files."""

    full: int
    weights: int

    def bytes(self, full: int, weights: int) -> int:
        """
        Args:
            full: bytes of one full checkpoint.
            weights: bytes of one weights-only checkpoint.
        """
        return self.full * full + self.weights * weights

    def __str__(self) -> str:
        return counted(self.full, "checkpoint") + (f" and {self.weights:,} of weights alone" if self.weights else "")


@dataclass(frozen=True)
class SimulatedCheckpoints:
    """Checkpoints of a whole run."""

    saves: int  # number of saves in the run
    peak: Count  # largest size on disk, the checkpoint being written included
    at_end: Count


@dataclass(frozen=True)
class Logs:
    """Bytes written besides the checkpoints."""

    start: float  # once per start
    step: float  # per step
    occasion: Mapping[str, float]  # per evaluation of each kind, in addition

    def total(self, steps: int, times: Mapping[str, int]) -> float:
        """
        Args:
            times: number of evaluations of each kind.
        """
        evaluations = sum(count * self.occasion.get(name, 0.0) for name, count in times.items())
        return self.start + self.step * steps + evaluations


def max_kept(settings: CheckpointSettings, step: int, rolling: int, epoch_ends: int, has_best: bool) -> Count:
    """Return an upper bound of the checkpoints that retention keeps, as if no two of them shared files.

    A checkpoint that is being written comes on top.

    Args:
        step: the last completed step.
        rolling: number of rolling checkpoints saved until then.
        epoch_ends: number of epochs completed until then.
        has_best: whether there is a best checkpoint.
    """
    newest = min(rolling, settings.keep_last)
    permanent = 0
    if settings.keep_every:
        permanent = min(rolling - newest, step // math.lcm(settings.every or step or 1, settings.keep_every))
    epochs = epoch_ends if settings.keep_epochs == "all" else min(epoch_ends, settings.keep_epochs)
    best = int(has_best and settings.keep_best)
    epoch_weights = epochs if settings.epochs_as == "weights" else 0
    best_weights = best if settings.best_as == "weights" else 0
    full = newest + permanent + (epochs - epoch_weights) + (best - best_weights)
    return Count(full, epoch_weights + best_weights)


def default_bytes(count: Count) -> int:
    """Return bytes per parameter of ``count`` checkpoints of a run without a moving average."""
    return count.bytes(CHECKPOINT_BYTES, WEIGHT_BYTES)


def simulate(
    settings: CheckpointSettings,
    schedule: RunSchedule,
    improving: bool,
    bytes_of: Callable[[Count], int] = default_bytes,
) -> SimulatedCheckpoints:
    """Replay all saves and deletions of a run with its own retention rules.

    Args:
        improving: True if each validation loss is the best so far: the best checkpoint then shares its files with the
            newest one. False if the first one remains the best and has files of its own.
        bytes_of: proportional to the size of so many checkpoints: determines when they are largest.

    Raises:
        UserError: there are too many checkpoints to simulate.
    """
    if schedule.save_every and schedule.steps // schedule.save_every > _MOST_SAVES:
        raise UserError(
            f"checkpoint.every={schedule.save_every} over {schedule.steps:,} steps is more than {_MOST_SAVES:,}"
            " checkpoints: increase checkpoint.every"
        )
    best = set(schedule.validations if improving else schedule.validations[:1])
    ends = {step: number for number, step in enumerate(schedule.epoch_ends, start=1)}
    saves, simulated = schedule.saves(best), _SimulatedDirectory(settings)
    before_validation = {*schedule.saves(())} & {*schedule.validations}  # the other tags follow after it
    peak = Count(0, 0)
    for step in saves:
        rolling = RetentionCandidate(rolling_tag(step), "rolling", step, verified=True)
        roles = []
        if step in ends:
            roles.append(RetentionCandidate(epoch_tag(ends[step]), "epoch", step, settings.epochs_as == "full"))
        if step in best and settings.keep_best:
            roles.append(RetentionCandidate(BEST_TAG, "best", step, settings.best_as == "full"))
        for new in ([rolling], roles) if step in before_validation else ([rolling, *roles],):
            simulated.add(new)
            peak = max(peak, simulated.count(), key=bytes_of)
            simulated.apply_retention()
    return SimulatedCheckpoints(len(saves), peak, simulated.count())


class _SimulatedDirectory:
    """The checkpoints of a simulated run.

    Checkpoints that no rule will delete any more are only counted: some runs keep thousands of them.
    """

    def __init__(self, settings: CheckpointSettings) -> None:
        self._settings, self._rules = settings, policies(settings)
        self._reduced = {"epoch": settings.epochs_as == "weights", "best": settings.best_as == "weights"}
        self._kept: list[RetentionCandidate] = []
        self._permanent: set[int] = set()  # steps of full checkpoints that are never deleted
        self._permanent_weights = 0

    def add(self, new: Sequence[RetentionCandidate]) -> None:
        self._kept += new

    def apply_retention(self) -> None:
        """Delete by the rules; a new best checkpoint replaces the older one."""
        newest_best = max((kept.step for kept in self._kept if kept.role == "best"), default=0)
        self._kept = [kept for kept in self._kept if kept.role != "best" or kept.step == newest_best]
        deleted = set(to_delete(self._kept, self._rules))
        newest = sorted({kept.step for kept in self._kept})[-self._settings.keep_last - PROTECTED :]
        remaining: list[RetentionCandidate] = []
        for kept in self._kept:
            if kept in deleted:
                continue
            if kept.step < newest[0] and self._is_permanent(kept):
                self._count_as_permanent(kept)
            else:
                remaining.append(kept)
        self._kept = remaining

    def count(self) -> Count:
        weights = [kept for kept in self._kept if self._reduced.get(kept.role)]
        full = {kept.step for kept in self._kept if not self._reduced.get(kept.role)}
        return Count(len(self._permanent) + len(full - self._permanent), self._permanent_weights + len(weights))

    def _is_permanent(self, kept: RetentionCandidate) -> bool:
        """Return whether no rule deletes a checkpoint that is no longer among the newest."""
        return kept.role == "rolling" or (kept.role == "epoch" and self._settings.keep_epochs == "all")

    def _count_as_permanent(self, kept: RetentionCandidate) -> None:
        if self._reduced.get(kept.role):
            self._permanent_weights += 1
        else:
            self._permanent.add(kept.step)
