"""Does somebody have to look at a run? What is wrong with it, in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.backup.failure_log import failing_since
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.common.formatting import clock, duration, size
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir.journal import Event, Kind
from ds_gpt2.run_dir.metrics import METRICS, Record
from ds_gpt2.run_dir.metrics_tail import time_of
from ds_gpt2.tools.resources.disk_forecast import DiskSpace
from ds_gpt2.tools.resources.run_state import AT_WORK, TRAINED, Life, State
from ds_gpt2.tools.status.progress import Loss

_DAY = 86_400.0
_SAVES_LATE = 3  # intervals without a checkpoint
_NOT_LOGGED_SECONDS, _NOT_LOGGED_STEPS = 300.0, 2  # records reach the file within seconds, or a step later

# Of the guards' incidents those that may go on. A spike or an update that was skipped is over at once; where they come
# in a row there is a divergence or a skipped_run.
_LASTING: tuple[Kind, ...] = ("divergence", "skipped_run", "frozen", "drift", "stuck_data", "rollback")


@dataclass(frozen=True)
class Problem:
    kind: Kind  # the journal's word that comes nearest
    text: str


def problems_of(
    life: Life,
    settings: Settings,
    events: Sequence[Event],
    step: int,
    loss: Loss,
    newest: Generation | None,
    disks: Sequence[DiskSpace],
    recorded: Record | None,
    now: float,
) -> list[Problem]:
    """What is wrong; nothing if the run is healthy.

    Args:
        step: the newest one done.
        newest: the newest checkpoint.
        recorded: the newest record of the metrics.
        now: seconds since 1970.
    """
    problems = _of_life(life, settings.run.name, now)
    if life.state in AT_WORK or life.state in ("waiting", "hung?", "finished"):
        problems += [*_of_loss(loss), *_of_backups(settings, events), *_of_missing_checkpoints(events)]
    if life.state in AT_WORK or life.state in ("waiting", "hung?"):
        problems += [
            *_of_saves(events, newest),
            *(_of_late_saves(settings, step, newest) if life.state in TRAINED else []),
            *_of_training(events, now),
            *(_of_unwritable_disks(disks) if life.is_here else []),
            *_of_disks(disks, settings.alerts.disk_days),
            *_of_records(life, recorded, now),
        ]
    else:
        problems += _of_last_checkpoint(settings, events, newest)
    return [*problems, *_of_messages(events)]


_BY_STATE: dict[State, tuple[Kind, str]] = {
    "hung?": ("hang", "no sign of life"),
    "dead": ("crash", "no process of it is left"),
    "gave up": ("gave_up", "no more restarts"),
    "mistake": ("mistake", "ended by a mistake in what it was told"),
}


def _of_life(life: Life, name: str, now: float) -> list[Problem]:
    if life.state in _BY_STATE:
        kind, text = _BY_STATE[life.state]
        fix = "" if life.state == "hung?" else f"; go on with ./launch.sh resume {name}"
        return [Problem(kind, (life.why or text) + fix)]
    if life.overdue and life.next_start is not None:
        return [Problem("hang", f"it should have been started again {duration(now - life.next_start)} ago")]
    return []


def _of_loss(loss: Loss) -> list[Problem]:
    """The newest losses, whatever the guards found: a whole run of NaN has no finite loss to compare with."""
    found = (("training", loss.train_not_finite_step), ("validation", loss.val_not_finite_step))
    return [
        Problem("not_finite", f"the newest {which} loss is NaN or infinite (step {step:,})")
        for which, step in found
        if step is not None
    ]


def _of_saves(events: Sequence[Event], newest: Generation | None) -> list[Problem]:
    problems = []
    last = next((event for event in reversed(events) if event.kind in ("save", "save_failed")), None)
    if last is not None and last.kind == "save_failed":
        problems.append(Problem("save_failed", f"step {last.step or 0:,} could not be saved"))
    if newest is not None and (damage := damage_of(newest)) is not None:
        problems.append(Problem("save_failed", f"{newest.tag} is damaged: {damage}"))
    return problems


def _of_last_checkpoint(settings: Settings, events: Sequence[Event], newest: Generation | None) -> list[Problem]:
    """Of a run that has ended: whether the checkpoint that it saved last is there, and whole."""
    last = next((event for event in reversed(events) if event.kind in ("save", "start")), None)
    saved = None if last is None or last.kind == "start" else last.step
    if newest is None and any(event.kind == "save" for event in events):
        return [Problem("save_failed", f"no checkpoints in {settings.checkpoint_dir}, though some were saved")]
    if newest is not None and (damage := damage_of(newest)) is not None:
        return [Problem("save_failed", f"{newest.tag} is damaged: {damage}")]
    if newest is not None and saved is not None and newest.step < saved:
        text = f"the last checkpoint, of step {saved:,}, is not in {settings.checkpoint_dir}"
        return [Problem("save_failed", f"{text}: the newest there is of step {newest.step:,}")]
    return []


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
    """Alerts that were not delivered, also of a run that has ended: the newest attempt failed on some channel."""
    alerts = [event for event in reversed(events) if event.kind == "alert"]
    at_the_end = list(itertools.takewhile(lambda event: "undelivered" in event.facts, alerts))
    if at_the_end:  # one of each channel
        return [Problem("alert", "; ".join(event.text for event in reversed(at_the_end)))]
    last = alerts[0] if alerts else None
    if last is None or "by" in last.facts:
        return []
    return [Problem("alert", f"messages are not delivered since {clock(last.time)}: {last.text}")]


def _of_late_saves(settings: Settings, step: int, newest: Generation | None) -> list[Problem]:
    """By steps, not hours: a run that lay still is not blamed for it."""
    every, since = settings.checkpoint.every, step - max(0, newest.step if newest is not None else 0)
    if not every or since <= _SAVES_LATE * every:
        return []
    return [Problem("save_failed", f"no checkpoint for {since:,} steps, one is due every {every:,}")]


def damage_of(generation: Generation) -> str | None:
    """What the manifest and the sizes of the files tell; their bytes are not read."""
    if generation.manifest is None:
        return generation.problem
    files = generation.manifest.files.items()
    found = (manifest.size_problem_of(generation.path, name, entry) for name, entry in files)
    return next((problem for problem in found if problem is not None), None)


def _of_training(events: Sequence[Event], now: float) -> list[Problem]:
    """What the guards found in the last day and no later checkpoint has left behind, the newest of a kind."""
    saves = [(event.time, event.step) for event in events if event.kind == "save" and event.step is not None]
    lasting: dict[Kind, Event] = {}
    for event in events:
        for kind in _LASTING:
            if event.kind == kind and event.time >= now - _DAY:
                lasting[kind] = event
    return [
        Problem(kind, f"{event.text}; no later step has been saved")
        for kind, event in lasting.items()
        if not any(time > event.time and step > (event.step or 0) for time, step in saves)
    ]


def _of_records(life: Life, recorded: Record | None, now: float) -> list[Problem]:
    """Ranks that train while nothing reaches the metrics."""
    when = None if recorded is None else time_of(recorded)
    if life.beat is None or life.state != "running" or recorded is None or when is None:  # an evaluation may take long
        return []
    if now - when < _NOT_LOGGED_SECONDS or life.beat.step - recorded["step"] <= _NOT_LOGGED_STEPS:
        return []
    text = f"nothing has been logged for {duration(now - when)}: the ranks are at step {life.beat.step:,}"
    return [Problem("not_logged", f"{text}, {METRICS} ends at step {recorded['step']:,}")]


def _of_unwritable_disks(disks: Sequence[DiskSpace]) -> list[Problem]:
    found = [room for room in disks if room.problem is not None]
    return [Problem("disk_low", f"the disk of {room.directories[0]} {room.problem}") for room in found]


def _of_disks(disks: Sequence[DiskSpace], enough_days: float) -> list[Problem]:
    return [
        Problem(
            "disk_low",
            f"the disk of {room.directories[0]} lasts {room.days_left:.1f} days at what this run writes:"
            f" {size(room.free_bytes)} free",
        )
        for room in disks
        if room.problem is None and room.days_left is not None and room.days_left < enough_days
    ]
