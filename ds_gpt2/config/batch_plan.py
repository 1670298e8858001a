"""Batch arithmetic: how the token budget of a step is divided among ranks and micro-batches."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config.sections import ScheduleSettings

_MAX_RANGE = 100_000
_DECAY_FRACTION = 0.1  # of the steps, as in Hu et al. 2024 (MiniCPM), section 4.3


@dataclass(frozen=True)
class BatchPlan:
    """tokens_per_step = micro_batch x sequence_length x accumulation x world_size."""

    micro_batch: int  # windows per forward/backward on one rank
    sequence_length: int  # tokens per window that are predicted
    accumulation: int  # micro-batches per step on one rank
    world_size: int

    @property
    def windows_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.sequence_length

    @property
    def division(self) -> str:
        """The four factors, as text."""
        return (
            f"{counted(self.micro_batch, 'window')} x {counted(self.sequence_length, 'token')}"
            f" x {counted(self.accumulation, 'micro-batch', 'micro-batches')} x {counted(self.world_size, 'rank')}"
        )

    def __str__(self) -> str:
        return f"{self.tokens_per_step:,} tokens per step = {self.division}"


def steps_of(schedule: ScheduleSettings, windows: int, windows_per_step: int) -> int:
    """Return the number of steps of a whole run; the last step is completed with windows of the next epoch.

    Args:
        windows: of one epoch.
    """
    if schedule.steps is not None:
        return schedule.steps
    return math.ceil((schedule.epochs or 0) * windows / windows_per_step)


def decay_steps_of(schedule: ScheduleSettings, steps: int) -> int:
    """Return the number of steps at the end of a run of ``steps`` steps in which the learning rate decays."""
    if schedule.shape == "wsd":
        return schedule.decay_steps or max(1, round((schedule.decay_fraction or _DECAY_FRACTION) * steps))
    return 0 if schedule.shape == "constant" else steps - schedule.warmup_steps


def check_schedule(schedule: ScheduleSettings, steps: int) -> None:
    """Check that the warm-up and the decay fit into a run of ``steps`` steps.

    Raises:
        UserError: they do not.
    """
    warmup, decay = schedule.warmup_steps, decay_steps_of(schedule, steps)
    if warmup >= steps:
        raise UserError(f"schedule.warmup_steps {warmup:,} must be below the {steps:,} steps of the run")
    if warmup + decay > steps:
        raise UserError(
            f"schedule.warmup_steps {warmup:,} and a decay of {decay:,} steps are more than the {steps:,} steps of the"
            f" run: set schedule.decay_steps to at most {steps - warmup}"
        )


def plan_batch(tokens_per_step: int, micro_batch: int, sequence_length: int, world_size: int) -> BatchPlan:
    """Return the batch plan of a token budget; the accumulation is derived.

    Raises:
        UserError: the budget is not a multiple of the tokens in one micro-batch of all ranks; the message proposes
            budgets, micro-batches and numbers of ranks that fit.
    """
    per_micro_batch = micro_batch * sequence_length * world_size
    if tokens_per_step % per_micro_batch == 0:
        return BatchPlan(micro_batch, sequence_length, tokens_per_step // per_micro_batch, world_size)

    below = tokens_per_step // per_micro_batch * per_micro_batch
    budgets = [budget for budget in (below, below + per_micro_batch) if budget > 0]
    proposal = f"batch.tokens_per_step={' or '.join(str(budget) for budget in budgets)} in a new run"
    counts = [
        ranks for ranks in range(1, 2 * world_size) if tokens_per_step % (micro_batch * sequence_length * ranks) == 0
    ]
    if counts:
        proposal += f", or use {counted(min(counts, key=lambda ranks: abs(ranks - world_size)), 'rank')}"
    fitting = _micro_batches_that_fit(tokens_per_step, sequence_length, world_size)
    if fitting:
        nearest = min(fitting, key=lambda size: (abs(size - micro_batch), -size))
        proposal = f"batch.micro_batch={nearest}, or {proposal}"
    raise UserError(
        f"batch.tokens_per_step={tokens_per_step} cannot be divided by micro_batch {micro_batch} x sequence_length"
        f" {sequence_length} x {counted(world_size, 'rank')} = {per_micro_batch}: set {proposal}"
    )


def fit_ranks(tokens_per_step: int, micro_batch: int, sequence_length: int, available: int) -> tuple[int, int]:
    """Return (ranks, micro_batch) that divide the token budget of a step exactly, as large as possible.

    The budget, and with it the windows of every step, does not change; surplus ranks are not used.

    Args:
        available: the number of devices.
    """
    windows = max(1, tokens_per_step // sequence_length)
    ranks = next(count for count in range(available, 0, -1) if windows % count == 0)
    per_rank = windows // ranks
    return ranks, next(size for size in range(min(micro_batch, per_rank), 0, -1) if per_rank % size == 0)


def _micro_batches_that_fit(tokens_per_step: int, sequence_length: int, world_size: int) -> list[int]:
    if tokens_per_step % (sequence_length * world_size):
        return []
    windows = tokens_per_step // (sequence_length * world_size)
    return [size for size in range(1, min(windows, 1024) + 1) if windows % size == 0]


def parse_batches(text: str | None) -> tuple[int, ...]:
    """Return the batches in ``"1200-1202,1250"`` as ``(1200, 1201, 1202, 1250)``, ascending; None gives ``()``.

    Raises:
        UserError: the text does not have that form.
    """
    found: set[int] = set()
    for part in (text or "").split(",") if text else ():
        bounds = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part.strip(), re.ASCII)
        first = int(bounds[1]) if bounds else 0
        last = int(bounds[2] or first) if bounds else 0
        if not 1 <= first <= last < first + _MAX_RANGE:
            raise UserError(f"--leave_out {text}: give batches as 1200-1210,1250, at most {_MAX_RANGE:,} in a range")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def format_batches(batches: Sequence[int]) -> str:
    """Return batches in the form that ``parse_batches`` reads."""
    ranges: list[tuple[int, int]] = []
    for batch in batches:
        if ranges and ranges[-1][1] == batch - 1:
            ranges[-1] = (ranges[-1][0], batch)
        else:
            ranges.append((batch, batch))
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
