"""Complete status of a run at one moment, from the ends of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint import catalog
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.common.formatting import DAY
from ds_gpt2.config.run_location import load_run_settings
from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.file_checks import read_error
from ds_gpt2.run_dir.fork_record import Fork, read_fork
from ds_gpt2.run_dir.last_step import last_step
from ds_gpt2.run_dir.metrics import Record
from ds_gpt2.run_dir.metrics_tail import time_of, values
from ds_gpt2.run_dir.starts import first_start, planned_steps, read_starts
from ds_gpt2.tools.resources.disk_forecast import DiskSpace, RunProgress, forecast_disks
from ds_gpt2.tools.resources.history import Goodput, History, history_of, newest_events
from ds_gpt2.tools.resources.run_hosts import RunHost, hosts_of
from ds_gpt2.tools.resources.run_state import State, finished_by_checkpoint, read_run_state
from ds_gpt2.tools.resources.run_steps import epochs_per_step, total_steps
from ds_gpt2.tools.status.problems import Problem, Snapshot, damage_of, problems_of
from ds_gpt2.tools.status.progress import RECORDS, SMOOTHED, Loss, Progress, loss_of, progress_of, read_pace


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint that the run can resume from."""

    tag: str
    step: int
    age_seconds: float | None
    damage: str | None  # according to its manifest and the sizes of its files; their content is not read


@dataclass(frozen=True)
class Gpus:
    """State of the GPUs as last recorded."""

    temperature_c: float  # of the hottest GPU
    throttled: int  # number of GPUs that are slowed down by heat or power limits


@dataclass(frozen=True)
class Status:
    """Content of ``status --json``; None where the files do not contain a value. Times are seconds since 1970."""

    run: str
    time: float  # of this status
    state: State
    state_text: str | None
    healthy: bool
    problems: list[Problem]
    beat_age_seconds: float | None  # age of the newest heartbeat of a rank
    next_start_time: float | None
    finish_time: float | None
    progress: Progress
    loss: Loss
    checkpoint: Checkpoint | None
    history: History
    disks: list[DiskSpace]
    gpus: Gpus | None
    hosts: list[RunHost]  # of a run on several machines; else empty
    forked_from: Fork | None  # the run's parent; None if it is not a fork


def read_status(run_dir: Path, now: float) -> Status:
    """Return the status of the run in ``run_dir``; missing files leave their part empty.

    Args:
        now: seconds since 1970.

    Raises:
        UserError: its settings or another of its files cannot be read.
    """
    try:
        return _read_status(run_dir, now)
    except OSError as error:
        raise read_error(error, run_dir) from None


def _read_status(run_dir: Path, now: float) -> Status:
    settings = load_run_settings(run_dir)
    records, events = metrics_tail.newest(run_dir, RECORDS), newest_events(run_dir)
    checkpoints = catalog.scan(settings.checkpoint_dir)
    newest = next((one for one in checkpoints if one.is_resumable), None)
    pace = read_pace(run_dir, settings, records, [event.step or 0 for event in events if event.kind == "start"])
    epoch_share = epochs_per_step(records)
    steps = total_steps(settings.schedule, planned_steps(read_starts(run_dir)), epoch_share)
    state = read_run_state(run_dir, settings, events, pace.mean_step_seconds(), now)
    state = finished_by_checkpoint(state, newest, steps)
    recorded_step = records[-1]["step"] if records else 0
    step = last_step(recorded_step, state.beat, newest.step if newest is not None else 0)
    fork = read_fork(run_dir)
    first_step = 0 if fork is None else fork.step
    progress, day_before = progress_of(settings, records, step, steps, pace), _day_before(run_dir, records)
    disks = forecast_disks(run_dir, settings, checkpoints, _run_progress(progress, epoch_share, first_step))
    loss = loss_of(records, day_before, newest, settings, first_step)
    recorded = records[-1] if records else None
    problems = problems_of(Snapshot(settings, state, events, step, loss, newest, disks, recorded, now))
    return Status(
        run=settings.run.name,
        time=now,
        state=state.state,
        state_text=state.why,
        healthy=not problems,
        problems=problems,
        beat_age_seconds=max(0.0, now - state.beat.time) if state.beat else None,
        next_start_time=state.next_start,
        finish_time=state.finish_time(now, progress.left_seconds),
        progress=progress,
        loss=loss,
        checkpoint=_checkpoint(newest, now) if newest else None,
        history=history_of(events, state.state, now, _goodput(run_dir, records, day_before)),
        disks=disks,
        gpus=_gpus(records),
        hosts=hosts_of(events),
        forked_from=fork,
    )


def _run_progress(progress: Progress, epoch_share: float | None, first_step: int) -> RunProgress | None:
    if progress.seconds_per_step is None or progress.steps is None or progress.step <= first_step:
        return None
    left = progress.steps - progress.step
    seconds_per_step = progress.seconds_per_step
    if progress.left_seconds and left > 0:
        seconds_per_step = progress.left_seconds / left
    return RunProgress(progress.step, progress.steps, seconds_per_step, epoch_share or 0.0, first_step)


def _goodput(run_dir: Path, records: Sequence[Record], day_before: Sequence[Record]) -> Goodput | None:
    newest, older = ([one for one in found if values([one], "perf/goodput")] for found in (records, day_before))
    if not newest:
        return None
    return Goodput.of(newest[-1], older[-1] if older else None, first_start(run_dir))


def _day_before(run_dir: Path, records: Sequence[Record]) -> list[Record]:
    """Return the last records that are at least a day older than the newest record."""
    newest = next((when for record in reversed(records) if (when := time_of(record)) is not None), None)
    return [] if newest is None else metrics_tail.before(run_dir, newest - DAY, SMOOTHED)


def _checkpoint(newest: Generation, now: float) -> Checkpoint:
    made = newest.manifest.made_at if newest.manifest is not None else 0.0
    return Checkpoint(newest.tag, newest.step, max(0.0, now - made) if made else None, damage_of(newest))


def _gpus(records: Sequence[Record]) -> Gpus | None:
    temperatures, throttled = values(records, "perf/gpu_temperature_c"), values(records, "perf/gpu_throttled")
    return Gpus(temperatures[-1], int(throttled[-1]) if throttled else 0) if temperatures else None
