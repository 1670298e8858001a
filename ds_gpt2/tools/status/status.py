"""Everything about a run at this moment, from the ends of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint import catalog
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.config.run_location import load_run_settings
from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.metrics import STARTS, Record, first_start, planned_steps, read_starts
from ds_gpt2.run_dir.metrics_tail import time_of, values
from ds_gpt2.tools.resources import disk_forecast, run_state
from ds_gpt2.tools.resources.disk_forecast import DiskSpace, RunProgress
from ds_gpt2.tools.resources.history import DAY, Goodput, History, history_of, newest_events
from ds_gpt2.tools.resources.run_state import AT_WORK, Life, State
from ds_gpt2.tools.resources.run_steps import epochs_per_step, total_steps
from ds_gpt2.tools.status.problems import Problem, damage_of, problems_of
from ds_gpt2.tools.status.progress import (
    RECORDS,
    SMOOTHED,
    Loss,
    Progress,
    loss_of,
    progress_of,
    read_pace,
)


@dataclass(frozen=True)
class Checkpoint:
    """The newest that a run could go on from."""

    tag: str
    step: int
    age_seconds: float | None
    damage: str | None  # what its manifest and the sizes of its files tell; their bytes are not read


@dataclass(frozen=True)
class Gpus:
    """As last recorded."""

    temperature_c: float  # of the hottest
    throttled: int  # so many are slowed down by heat or supply


@dataclass(frozen=True)
class Status:
    """What ``status --json`` prints; None where the files do not tell. Times are seconds since 1970."""

    run: str
    time: float  # of this look
    state: State
    state_text: str | None
    healthy: bool
    problems: list[Problem]
    beat_age_seconds: float | None  # of a rank's newest sign of life
    next_start_time: float | None
    finish_time: float | None
    progress: Progress
    loss: Loss
    checkpoint: Checkpoint | None
    history: History
    disks: list[DiskSpace]
    gpus: Gpus | None


def look(run_dir: Path, now: float) -> Status:
    """The run in ``run_dir``; files that are missing leave their part empty.

    Args:
        now: seconds since 1970.

    Raises:
        UserError: its settings cannot be read.
    """
    settings = load_run_settings(run_dir)
    records, events = metrics_tail.newest(run_dir, RECORDS), newest_events(run_dir)
    found = catalog.scan(settings.checkpoint_dir)
    newest = next((one for one in found if one.is_resumable), None)
    pace = read_pace(run_dir, settings, records, [event.step or 0 for event in events if event.kind == "start"])
    alive = run_state.look(run_dir, settings, events, pace.mean_step_seconds(), now)
    planned = planned_steps(read_starts(run_dir / STARTS))
    steps = total_steps(settings.schedule, planned, epochs_per_step(records))
    if (
        alive.state == "dead"
        and alive.why is None
        and steps is not None
        and newest is not None
        and newest.step >= steps
        and (newest.manifest is None or newest.manifest.is_evaluated)
    ):
        alive = Life("finished", is_here=alive.is_here)  # its journal could not be written at the end
    progress = progress_of(settings, records, _step(records, alive, newest), steps, pace)
    day_before = _day_before(run_dir, records)
    disks = disk_forecast.look(run_dir, settings, found, _progress_of(progress, epochs_per_step(records)))
    loss = loss_of(records, day_before, newest, settings)
    problems = problems_of(
        alive, settings, events, progress.step, loss, newest, disks, records[-1] if records else None, now
    )
    at_work = alive.state in AT_WORK and progress.left_seconds is not None
    return Status(
        run=settings.run.name,
        time=now,
        state=alive.state,
        state_text=alive.why,
        healthy=not problems,
        problems=problems,
        beat_age_seconds=max(0.0, now - alive.beat.time) if alive.beat else None,
        next_start_time=alive.next_start,
        finish_time=now + (progress.left_seconds or 0.0) if at_work else None,
        progress=progress,
        loss=loss,
        checkpoint=_checkpoint(newest, now) if newest else None,
        history=history_of(events, alive.state, now, _goodput(run_dir, records, day_before)),
        disks=disks,
        gpus=_gpus(records),
    )


def _step(records: Sequence[Record], alive: Life, newest: Generation | None) -> int:
    """The newest one done: records come some seconds late, or not at all where the disk is full."""
    recorded = records[-1]["step"] if records else 0
    return max(recorded, alive.beat.step - 1 if alive.beat else 0, newest.step if newest is not None else 0)


def _progress_of(progress: Progress, epochs_a_step: float | None) -> RunProgress | None:
    if progress.seconds_per_step is None or progress.steps is None or not progress.step:
        return None
    left = progress.steps - progress.step
    a_step = progress.left_seconds / left if progress.left_seconds and left > 0 else progress.seconds_per_step
    return RunProgress(progress.step, progress.steps, a_step, epochs_a_step or 0.0)


def _goodput(run_dir: Path, records: Sequence[Record], day_before: Sequence[Record]) -> Goodput | None:
    newest, older = ([one for one in found if values([one], "perf/goodput")] for found in (records, day_before))
    if not newest:
        return None
    begun = first_start(run_dir / STARTS)
    return Goodput.of(newest[-1], older[-1] if older else None, begun)


def _day_before(run_dir: Path, records: Sequence[Record]) -> list[Record]:
    """Up to a day before the newest record."""
    newest = next((when for record in reversed(records) if (when := time_of(record)) is not None), None)
    return [] if newest is None else metrics_tail.before(run_dir, newest - DAY, SMOOTHED)


def _checkpoint(newest: Generation, now: float) -> Checkpoint:
    made = newest.manifest.made_at if newest.manifest is not None else 0.0
    return Checkpoint(newest.tag, newest.step, max(0.0, now - made) if made else None, damage_of(newest))


def _gpus(records: Sequence[Record]) -> Gpus | None:
    temperatures, throttled = values(records, "perf/gpu_temperature_c"), values(records, "perf/gpu_throttled")
    return Gpus(temperatures[-1], int(throttled[-1]) if throttled else 0) if temperatures else None
