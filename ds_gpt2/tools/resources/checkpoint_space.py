"""How much room a run takes on the disk: checkpoints by what retention keeps, logs by what a step writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Checkpoints with bytes of their own: those that share a step are hard links to the same files."""

    full: int
    weights: int

    def bytes(self, full: int, weights: int) -> int:
        """
        Args:
            full, weights: bytes of one of each kind.
        """
        return self.full * full + self.weights * weights

    def __str__(self) -> str:
        return counted(self.full, "checkpoint") + (f" and {self.weights:,} of weights alone" if self.weights else "")


@dataclass(frozen=True)
class Store:
    """What a run keeps."""

    saves: int  # how often it saves
    most: Count  # at once, one being written included
    at_end: Count


@dataclass(frozen=True)
class Logs:
    """Bytes written beside the checkpoints."""

    start: float  # once
    step: float  # each step
    occasion: Mapping[str, float]  # more, whenever something else than training happens, by name

    def total(self, steps: int, times: Mapping[str, int]) -> float:
        """After so many steps and occasions."""
        aside = sum(count * self.occasion.get(name, 0.0) for name, count in times.items())
        return self.start + self.step * steps + aside


def simulate(settings: CheckpointSettings, schedule: RunSchedule, improving: bool) -> Store:
    """Save and delete as the run would, by its own rules.

    Args:
        improving: whether each validation loss is the best so far, so that the best checkpoint shares its files with a
            new one; else the first stays the best and has files of its own.

    Raises:
        UserError: there are too many checkpoints to simulate.
    """
    if schedule.save_every and schedule.steps // schedule.save_every > _MOST_SAVES:
        raise UserError(
            f"checkpoint.every={schedule.save_every} over {schedule.steps:,} steps is more than {_MOST_SAVES:,}"
            " checkpoints: set checkpoint.every to more"
        )
    best = set(schedule.validations if improving else schedule.validations[:1])
    ends = {step: number for number, step in enumerate(schedule.epoch_ends, start=1)}
    saves, shelf = schedule.saves(best), _Shelf(settings)
    most = Count(0, 0)
    for step in saves:
        new = [RetentionCandidate(rolling_tag(step), "rolling", step, verified=True)]
        if step in ends:
            new.append(RetentionCandidate(epoch_tag(ends[step]), "epoch", step, settings.epochs_as == "full"))
        if step in best and settings.keep_best:
            new.append(RetentionCandidate(BEST_TAG, "best", step, settings.best_as == "full"))
        shelf.add(new)
        most = max(most, shelf.count(), key=_size)
        shelf.tidy()
    return Store(len(saves), most, shelf.count())


class _Shelf:
    """The checkpoints there are. Those that no rule will ever touch are only counted: some runs keep thousands."""

    def __init__(self, settings: CheckpointSettings) -> None:
        self._settings, self._rules = settings, policies(settings)
        self._reduced = {"epoch": settings.epochs_as == "weights", "best": settings.best_as == "weights"}
        self._kept: list[RetentionCandidate] = []
        self._settled: set[int] = set()  # steps of whole ones
        self._settled_weights = 0

    def add(self, new: Sequence[RetentionCandidate]) -> None:
        self._kept += new

    def tidy(self) -> None:
        """Delete by the rules; an older best goes when the new one is there."""
        newest_best = max((one.step for one in self._kept if one.role == "best"), default=0)
        self._kept = [one for one in self._kept if one.role != "best" or one.step == newest_best]
        gone = set(to_delete(self._kept, self._rules))
        newest = sorted({one.step for one in self._kept})[-self._settings.keep_last - PROTECTED :]
        left: list[RetentionCandidate] = []
        for one in self._kept:
            if one in gone:
                continue
            if one.step < newest[0] and self._lasts(one):
                self._settle(one)
            else:
                left.append(one)
        self._kept = left

    def count(self) -> Count:
        weights = [one for one in self._kept if self._reduced.get(one.role)]
        full = {one.step for one in self._kept if not self._reduced.get(one.role)}
        return Count(len(self._settled) + len(full - self._settled), self._settled_weights + len(weights))

    def _lasts(self, one: RetentionCandidate) -> bool:
        """Whether what has outlived the newest ones stays to the end."""
        return one.role == "rolling" or (one.role == "epoch" and self._settings.keep_epochs == "all")

    def _settle(self, one: RetentionCandidate) -> None:
        if self._reduced.get(one.role):
            self._settled_weights += 1
        else:
            self._settled.add(one.step)


def _size(count: Count) -> int:
    return count.bytes(CHECKPOINT_BYTES, WEIGHT_BYTES)
