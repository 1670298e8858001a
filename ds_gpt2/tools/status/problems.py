"""Problems of a run that require the user's attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.backup.failure_log import failing_since
from ds_gpt2.checkpoint.catalog import Generation, describe_files, wrong_size
from ds_gpt2.common.formatting import DAY, clock, duration, size
from ds_gpt2.config.run_location import run_argument
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir.file_checks import RESTORE_METRICS, metrics_problem
from ds_gpt2.run_dir.journal import Event, Kind
from ds_gpt2.run_dir.metrics import METRICS, Record
from ds_gpt2.run_dir.metrics_tail import time_of
from ds_gpt2.tools.resources.disk_forecast import DiskSpace
from ds_gpt2.tools.resources.losses import not_finite_warnings
from ds_gpt2.tools.resources.run_hosts import hosts_of
from ds_gpt2.tools.resources.run_state import ACTIVE, TRAINING_OR_DONE, RunState, State
from ds_gpt2.tools.status.progress import Loss

_SAVES_LATE = 3  # intervals without a checkpoint
_NOT_LOGGED_SECONDS, _NOT_LOGGED_STEPS = 300.0, 2  # records reach the file within seconds, or one step later

# Incidents of the guards that may persist. A spike or a skipped update is over immediately; several in a row are
# reported as a divergence or a skipped_run.
_PERSISTENT: tuple[Kind, ...] = ("divergence", "skipped_run", "frozen", "drift", "stuck_data", "rollback")


@dataclass(frozen=True)
class Problem:
    kind: Kind  # the closest kind of journal event
    text: str


@dataclass(frozen=True)
class Snapshot:
    """The facts from which the problems of a run are determined."""

    settings: Settings
    state: RunState
    events: Sequence[Event]
    step: int  # the last completed step
    loss: Loss
    newest: Generation | None  # the newest checkpoint
    disks: Sequence[DiskSpace]
    recorded: Record | None  # the newest record of the metrics
    now: float  # seconds since 1970


def problems_of(run: Snapshot) -> list[Problem]:
    """Return the problems of a run; an empty list if it is healthy.

    Raises:
        OSError: the directory of its checkpoints cannot be read.
    """
    state = run.state.state
    problems = _of_state(run)
    if state in ACTIVE or state in ("waiting", "hung?", "finished"):
        problems += [
            *_of_loss(run.loss),
            *_of_backups(run.settings, run.events),
            *_of_missing_checkpoints(run.events),
        ]
    if state in ACTIVE or state in ("waiting", "hung?"):
        problems += [
            *_of_hosts(run),
            *_of_saves(run.events, run.newest),
            *(_of_late_saves(run) if state in TRAINING_OR_DONE else []),
            *_of_training(run.events, run.now),
            *(_of_unwritable_disks(run.disks) if run.state.is_here else []),
            *_of_full_disks(run.disks, run.settings.alerts.disk_days),
            *_of_records(run),
        ]
    else:
        problems += _of_last_checkpoint(run)
    return [*problems, *_of_files(run.settings.checkpoint_dir), *_of_missing_records(run), *_of_messages(run.events)]


_BY_STATE: dict[State, tuple[Kind, str]] = {
    "hung?": ("hang", "no heartbeat"),
    "dead": ("crash", "the run has no process"),
    "gave up": ("gave_up", "no more restarts"),
    "mistake": ("mistake", "stopped by a configuration error"),
}


def _of_state(run: Snapshot) -> list[Problem]:
    state = run.state
    if state.state in _BY_STATE:
        kind, text = _BY_STATE[state.state]
        first = "correct it, then resume" if state.state == "mistake" else "resume"
        fix = (
            "" if state.state == "hung?" else f"; {first} with ./launch.sh resume {run_argument(run.settings.run_dir)}"
        )
        return [Problem(kind, (state.why or text) + fix)]
    if state.overdue and state.next_start is not None:
        return [Problem("hang", f"the supervisor's restart is overdue by {duration(run.now - state.next_start)}")]
    return []


def _of_hosts(run: Snapshot) -> list[Problem]:
    """Report hosts that are away, and that the supervisor waits for them."""
    last = next((event for event in reversed(run.events) if event.kind in ("few_hosts", "launch")), None)
    if last is not None and last.kind == "few_hosts":
        return [Problem("few_hosts", last.text)]
    return [
        Problem("host_lost", f"host {host.name} is away since {clock(host.away_since)}: {host.away_reason}")
        for host in hosts_of(run.events)
        if host.away_since is not None
    ]


def _of_loss(loss: Loss) -> list[Problem]:
    """Check the newest losses independently of the guards, which have no finite loss to compare with in a NaN run."""
    texts = not_finite_warnings(loss.train_not_finite_step, loss.val_not_finite_step)
    return [Problem("not_finite", text) for text in texts]


def _of_saves(events: Sequence[Event], newest: Generation | None) -> list[Problem]:
    problems = []
    last = next((event for event in reversed(events) if event.kind in ("save", "save_failed")), None)
    if last is not None and last.kind == "save_failed":
        problems.append(Problem("save_failed", f"step {last.step or 0:,} could not be saved"))
    return [*problems, *_of_damage(newest)]


def _of_damage(newest: Generation | None) -> list[Problem]:
    damage = None if newest is None else damage_of(newest)
    return [] if newest is None or damage is None else [Problem("save_failed", f"{newest.tag} is damaged: {damage}")]


def _of_last_checkpoint(run: Snapshot) -> list[Problem]:
    """Check that the last saved checkpoint of an ended run exists and is complete."""
    newest, directory = run.newest, run.settings.checkpoint_dir
    if newest is None:
        if not any(event.kind == "save" for event in run.events):
            return []
        return [Problem("save_failed", f"no checkpoints in {directory}, although some were saved")]
    if problems := _of_damage(newest):
        return problems
    last = next((event for event in reversed(run.events) if event.kind in ("save", "start")), None)
    saved = None if last is None or last.kind == "start" else last.step
    if saved is None or newest.step >= saved:
        return []
    text = f"the last checkpoint, of step {saved:,}, is not in {directory}: the newest is of step {newest.step:,}"
    return [Problem("save_failed", text)]


def _of_files(checkpoints: Path) -> list[Problem]:
    text = describe_files(checkpoints)
    return [] if text is None else [Problem("save_failed", text)]


def _of_backups(settings: Settings, events: Sequence[Event]) -> list[Problem]:
    last = next((event for event in reversed(events) if event.kind in ("backup_failed", "backup_ok")), None)
    since = failing_since(last)
    if last is None or since is None or settings.checkpoint.backup.to is None:
        return []
    return [Problem("backup_failed", f"no backups since {clock(since)}: {last.text}")]


def _of_missing_checkpoints(events: Sequence[Event]) -> list[Problem]:
    last = next((event for event in reversed(events) if event.kind in ("no_checkpoints", "start", "save")), None)
    return [Problem("no_checkpoints", last.text)] if last is not None and last.kind == "no_checkpoints" else []


def _of_messages(events: Sequence[Event]) -> list[Problem]:
    """Report alerts that were not delivered, also of an ended run: the last attempt failed on some channel."""
    alerts = [event for event in reversed(events) if event.kind == "alert"]
    undelivered = list(itertools.takewhile(lambda event: "undelivered" in event.facts, alerts))
    if undelivered:  # at the end of the run, one event per channel
        return [Problem("alert", "; ".join(event.text for event in reversed(undelivered)))]
    last = alerts[0] if alerts else None
    if last is None or "by" in last.facts:
        return []
    return [Problem("alert", f"messages have not been delivered since {clock(last.time)}: {last.text}")]


def _of_late_saves(run: Snapshot) -> list[Problem]:
    """Compare steps, not hours: a pause is not a missing save."""
    every = run.settings.checkpoint.every
    since = run.step - max(0, run.newest.step if run.newest is not None else 0)
    if not every or since <= _SAVES_LATE * every:
        return []
    return [Problem("save_failed", f"no checkpoint for {since:,} steps, although one is due every {every:,}")]


def damage_of(generation: Generation) -> str | None:
    """Return the damage according to the manifest and the sizes of the files, whose content is not read; else None."""
    return generation.problem or wrong_size(generation)


def _of_training(events: Sequence[Event], now: float) -> list[Problem]:
    """Return the newest incident of each kind in the last day, unless a later step has been saved since."""
    saves = [(event.time, event.step) for event in events if event.kind == "save" and event.step is not None]
    persistent: dict[Kind, Event] = {}
    for event in events:
        for kind in _PERSISTENT:
            if event.kind == kind and event.time >= now - DAY:
                persistent[kind] = event
    return [
        Problem(kind, f"{event.text}; no later step has been saved")
        for kind, event in persistent.items()
        if not any(time > event.time and step > (event.step or 0) for time, step in saves)
    ]


def _of_records(run: Snapshot) -> list[Problem]:
    """Report ranks that train while no record reaches the metrics."""
    recorded, beat = run.recorded, run.state.beat
    logged = None if recorded is None else time_of(recorded)
    if beat is None or run.state.state != "running" or recorded is None or logged is None:  # evaluations may take long
        return []
    if run.now - logged < _NOT_LOGGED_SECONDS or beat.step - recorded["step"] <= _NOT_LOGGED_STEPS:
        return []
    text = f"nothing has been logged for {duration(run.now - logged)}: the ranks are at step {beat.step:,}"
    return [Problem("not_logged", f"{text}, {METRICS} ends at step {recorded['step']:,}")]


def _of_missing_records(run: Snapshot) -> list[Problem]:
    recorded, saved = (run.recorded or {}).get("step", 0), run.newest.step if run.newest is not None else 0
    text = metrics_problem(run.settings.run_dir, recorded, saved)
    return [] if text is None else [Problem("not_logged", f"{text}; {RESTORE_METRICS}")]


def _of_unwritable_disks(disks: Sequence[DiskSpace]) -> list[Problem]:
    return [
        Problem("disk_low", f"the disk of {disk.directories[0]} {disk.problem}")
        for disk in disks
        if disk.problem is not None
    ]


def _of_full_disks(disks: Sequence[DiskSpace], minimum_days: float) -> list[Problem]:
    return [
        Problem(
            "disk_low",
            f"the disk of {disk.directories[0]} lasts {disk.days_left:.1f} days at the run's write rate:"
            f" {size(disk.free_bytes)} free",
        )
        for disk in disks
        if disk.problem is None and disk.days_left is not None and disk.days_left < minimum_days
    ]
