"""Build the parts of a run and hand them to the loop.

Importing this imports DeepSpeed, which then picks its accelerator: call ``device.choose`` first.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manager import Checkpoints, library_versions
from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.checkpoint.resume import Restored, choose_checkpoint
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import append_lines
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config import deepspeed_config
from ds_gpt2.config.batch_plan import BatchPlan, format_batches
from ds_gpt2.config.run_location import HIDDEN, public_tree, write_first_settings, write_owner, write_settings
from ds_gpt2.config.settings import PATH_KEYS, PROJECT_DIR, Settings, flat, to_yaml
from ds_gpt2.data.dataset import Windows
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.verify import check_shards
from ds_gpt2.distributed import collectives, device
from ds_gpt2.engine.engine import Engine, close_process_group, open_process_group
from ds_gpt2.engine.rng_state import seed_everything
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2, count_parameters, flops_per_token
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.monitoring import console
from ds_gpt2.monitoring.monitor import Monitor
from ds_gpt2.monitoring.pace import Cadence, Pace, timed_of
from ds_gpt2.monitoring.reference_curves import REFERENCE_TOKENS_PER_STEP
from ds_gpt2.monitoring.step_timer import Meter, Past
from ds_gpt2.monitoring.tensorboard_layout import open_dashboard
from ds_gpt2.monitoring.trackers import Tracker, open_trackers
from ds_gpt2.pretrained.load import weights_for
from ds_gpt2.run_dir.exit_report import CRASHED, DONE, ROLLBACK, STOPPED, Outcome
from ds_gpt2.run_dir.heartbeat import Heartbeat, enable_stack_dumps
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.run_dir.metrics import (
    METRICS,
    STARTS,
    TIME,
    UNWRITTEN,
    first_start,
    read_metrics,
    read_starts,
    started_from,
)
from ds_gpt2.run_dir.stop_request import STOP_FILE, StopRequest
from ds_gpt2.training import loop
from ds_gpt2.training.guards import Anomaly, Guard
from ds_gpt2.training.hooks import Health, Histograms, Hook, Interrupted, Samples, Validation, open_hellaswag
from ds_gpt2.training.loop import Ending
from ds_gpt2.training.lr_schedule import Every, learning_rate
from ds_gpt2.training.preflight import (
    backup_of,
    begins_anew,
    check_initial_model,
    dataset_of,
    identity_of,
    steps_of,
    what_to_resume,
)

log = logging.getLogger(__name__)

_COMMAND = "alerts.command"  # may hold a password
_PROGRESS_SECONDS = 0.2  # between two looks for a stop during an observation

_HYPER_PARAMETERS: Any = {
    "run": {"seed"},
    "model": True,
    "batch": True,
    "schedule": True,
    "optimizer": {"eps", "weight_decay", "grad_clip"},
}


@dataclass(frozen=True)
class Origin:
    """What a run is to begin with."""

    resume: str | None = None  # what to go on from, see ``catalog.candidates``; None: start afresh
    leave_out: tuple[int, ...] = ()  # batches of the data that are never to be trained on


def run(
    settings: Settings,
    deepspeed_settings: dict[str, Any],
    plan: BatchPlan,
    place: torch.device,
    compiled: bool,
    origin: Origin,
) -> Outcome:
    """One rank's part of a run.

    Raises:
        UserError: on every rank, for mistakes that the user can fix.
    """
    open_process_group(place)
    with contextlib.ExitStack() as endings:
        try:
            result = _train(settings, deepspeed_settings, plan, place, compiled, origin, endings)
        except UserError:
            close_process_group()
            raise
        close_process_group()
    return result


def _train(
    settings: Settings,
    deepspeed_settings: dict[str, Any],
    plan: BatchPlan,
    place: torch.device,
    compiled: bool,
    origin: Origin,
    endings: contextlib.ExitStack,
) -> Outcome:
    """
    Args:
        endings: gets what must be closed, however the run ends.
    """
    if settings.model.init_from is not None and collectives.broadcast_from_main(
        lambda: begins_anew(settings, origin.resume)
    ):
        collectives.broadcast_slow_from_main(lambda: check_initial_model(settings))  # downloads it if it is on the hub
    collectives.call_on_all_ranks(lambda: _check_directories(settings))
    heartbeat, journal = Heartbeat(settings.run_dir, collectives.rank()), Journal(settings.run_dir)
    enable_stack_dumps(settings.run_dir, collectives.rank())
    console.open_log(settings.run_dir / "train.log")
    made_again = functools.partial(_restore_checkpoint_dir, settings, journal, endings)
    house = CheckpointDirectory(Disk(), settings.checkpoint_dir, settings.checkpoint, made_again)
    lock = collectives.call_on_all_ranks(lambda: _take_over(settings, house))
    wanted = collectives.broadcast_from_main(lambda: what_to_resume(settings, origin.resume))
    heartbeat.beat()
    dataset = collectives.call_on_all_ranks(lambda: dataset_of(settings, wanted))
    check_shards(dataset, settings.run_dir / "data_checked.json")
    heartbeat.beat()
    tell_of_data = functools.partial(_tell_of_data, journal)
    stop = _stop_request(settings)
    stopped = functools.partial(_is_stopped, stop, settings.run_dir / STOP_FILE)
    windows = Windows(dataset, "train", plan.sequence_length, tell_of_data, stopped)
    data = TrainingData(windows, plan, collectives.rank(), settings.run.seed, place)
    course = _course(settings, data)
    identity = identity_of(settings, dataset)
    backup = backup_of(settings)
    restored = choose_checkpoint(settings.checkpoint_dir, wanted, identity, backup) if wanted else None

    heartbeat.beat()
    engine = _engine(settings, deepspeed_settings, plan, compiled)
    heartbeat.beat()
    run_settings = public_tree(settings)
    checkpoints = Checkpoints(house, engine, identity, run_settings, backup, journal)
    state = checkpoints.load(restored) if restored else _fresh(settings, engine)
    state.leave_out(origin.leave_out)
    trackers = collectives.call_on_all_ranks(lambda: _open_trackers(settings, deepspeed_settings, state, plan))
    reserve = functools.partial(_reserve, checkpoints)
    monitor = Monitor(engine, settings.run_dir / METRICS, state.recorded_step, trackers, reserve)
    endings.push(lambda kind, error, trace: monitor.close(failed=kind is not None))
    meter = _meter(settings, engine, plan, place, state.step)
    held_out = functools.partial(Windows, dataset, "val", plan.sequence_length, tell_of_data, stopped)
    hooks = _hooks(settings, held_out, engine, _Progress(heartbeat, stop, settings.run_dir / STOP_FILE))
    stop.listen()
    collectives.barrier()  # once the start is announced, any rank must accept a stop
    if collectives.is_main():
        _record_start(settings, state, plan, course.steps)
        _open_dashboard(settings, monitor, engine, plan, restored, origin)
        journal.write("start", _start_text(plan, restored, origin), state.step, left_out=state.left_out)
    log.info(f"run {settings.run.name}: {device.describe(place)}{', compiled' if compiled else ''}")
    log.info(f"model {count_parameters(engine.model):,} parameters; {plan}; {len(data.windows):,} windows an epoch")
    if restored:
        log.info(f"resumed from {restored.generation.path}, step {state.step} of {course.steps}")
        for change in _changes(restored.manifest.settings, settings):
            log.info(f"changed since then: {change}")
        del restored  # a copy of all the state

    guard = Guard(settings.guards, functools.partial(_tell, journal))
    lines = console.StepLines(state.step, course.steps)
    gc.collect()
    gc.freeze()  # looking through the libraries' 400,000 objects takes 0.2 s, on each rank at another time
    ending = loop.train(course, state, engine, data, hooks, monitor, checkpoints, meter, lines, stop, guard, heartbeat)
    lines.close()
    monitor.close()
    stop.clear()
    newest = newest_tag(checkpoints.directory)
    saved = f"checkpoint {checkpoints.directory / newest}" if newest else "no checkpoint is saved"
    if ending == Ending.STOPPED and stop.reason is not None:
        log.warning(f"{stop.reason}: stopping")
    log.info(f"{ending.value} at step {state.step} of {course.steps}; {saved}")
    engine.close()
    result = _outcome(ending, guard, stop.supervisor_lost)
    if lock is not None:
        _note_end(journal, ending, result, state, course)
        lock.close()
    return result


def _reserve(checkpoints: Checkpoints) -> Path:
    return checkpoints.directory / UNWRITTEN


def _is_stopped(stop: StopRequest, file: Path) -> bool:
    """Whether a stop is requested, as far as this rank sees it; used where ranks cannot ask each other."""
    return stop.signalled or os.path.lexists(file)  # unlike Path.exists, it does not raise if the disk fails


def _stop_request(settings: Settings) -> StopRequest:
    if not collectives.is_main():
        return StopRequest()
    stop = StopRequest(OpenDirectory(settings.run_dir), OpenDirectory(settings.checkpoint_dir))
    if not stop.is_supervised:  # a supervisor has done it, and a request since then counts
        stop.clear()
    return stop


def _tell(journal: Journal, incident: Anomaly) -> None:
    if collectives.is_main():
        log.warning(f"step {incident.step}: {incident.text}")
        facts = {"policy": incident.policy, "begun": incident.begun, "batches": list(incident.batches)}
        journal.write(incident.kind, incident.text, incident.step, **facts)


def _tell_of_data(journal: Journal, text: str) -> None:
    """Of whichever rank it befell, from whichever thread."""
    text = f"rank {collectives.rank()}: {text}"
    log.error(text)
    journal.write("data_error", text)


def _outcome(ending: Ending, guard: Guard, alone: bool) -> Outcome:
    if guard.rollback is not None:
        batches = format_batches(guard.rollback.batches)
        leave_out = f" --leave_out {batches}" if batches else ""
        log.info(f"to go back: --resume before:{guard.rollback.begun}{leave_out} (the supervisor does it by itself)")
        return Outcome(ROLLBACK, before=guard.rollback.begun, leave_out=guard.rollback.batches)
    if ending is Ending.NOT_FINITE:
        log.error("losses or weights are not finite: resume from an earlier checkpoint, with a lower schedule.max_lr")
    return Outcome({Ending.DONE: DONE, Ending.STOPPED: STOPPED}.get(ending, CRASHED), alone=alone)


def _note_end(journal: Journal, ending: Ending, result: Outcome, state: TrainState, course: loop.Course) -> None:
    """Crashes are noted by the supervisor; so is a rollback, which it makes."""
    if ending is Ending.UNSAVED:
        journal.write("save_failed", "ended, but the last state could not be saved", state.step, ended=True)
    if result.code == DONE:
        journal.write("done", f"done, {course.steps:,} steps", state.step)
    elif result.code == STOPPED:
        journal.write("stop", f"stopped on request at step {state.step:,} of {course.steps:,}, saved", state.step)


def _check_directories(settings: Settings) -> None:
    if collectives.is_main():
        for directory in settings.output_dirs:
            files.check_writable(directory)
        write_first_settings(settings)


def _restore_checkpoint_dir(settings: Settings, journal: Journal, endings: contextlib.ExitStack, text: str) -> None:
    """The directory of checkpoints was deleted and made again: mark and lock it as it was."""
    log.error(text)
    journal.write("no_checkpoints", text)
    write_owner(settings.checkpoint_dir, settings.run_dir)
    endings.enter_context(files.lock(settings.checkpoint_dir / LOCK, f"run {settings.run.name}"))


def _take_over(settings: Settings, house: CheckpointDirectory) -> BinaryIO | None:
    """On rank 0: lock the run against other processes, and bring its checkpoints in order."""
    if not collectives.is_main():
        return None
    lock = files.lock(house.directory / LOCK, f"run {settings.run.name}")
    house.start()
    return lock


def _open_trackers(
    settings: Settings, deepspeed_settings: dict[str, Any], state: TrainState, plan: BatchPlan
) -> dict[str, Tracker]:
    if not collectives.is_main():
        return {}
    return open_trackers(deepspeed_settings, settings.run_dir, settings.run.name, state.step, plan.windows_per_step)


class _Progress:
    """Called often during an observation, on each rank alone: other ranks may be elsewhere in theirs, or done."""

    def __init__(self, heartbeat: Heartbeat, stop: StopRequest, stop_file: Path) -> None:
        self._heartbeat, self._stop, self._stop_file = heartbeat, stop, stop_file
        self._next = 0.0

    def __call__(self) -> None:
        """
        Raises:
            Interrupted: a stop is requested.
        """
        if self._stop.signalled:
            raise Interrupted
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PROGRESS_SECONDS
        self._heartbeat.beat()
        if self._stop.requested or _is_stopped(self._stop, self._stop_file):
            raise Interrupted


def _hooks(
    settings: Settings, held_out: Callable[[], Windows], engine: Engine, progress: Callable[[], None]
) -> list[Hook]:
    hooks: list[Hook] = [Health(engine.device)]
    if settings.histograms.every:  # before those that a stop may interrupt: it cannot be repeated
        hooks.append(Histograms(settings.histograms, engine.model))
    if settings.validation.every:
        hooks.append(Validation(settings.validation, held_out(), settings.batch.micro_batch))
    if settings.samples.every:
        directory, context = settings.run_dir / "samples", settings.batch.sequence_length
        hooks.append(Samples(settings.samples, settings.run.seed, directory, context))
    if settings.hellaswag.every:
        hellaswag = open_hellaswag(settings.hellaswag, settings.run_dir)
        hooks += [hellaswag] if hellaswag is not None else []
    for hook in hooks:
        hook.progress = progress
    return hooks


def _engine(settings: Settings, deepspeed_settings: dict[str, Any], plan: BatchPlan, compiled: bool) -> Engine:
    seed_everything(settings.run.seed)
    model = GPT2(ModelShape(*settings.model.shape, plan.sequence_length), settings.model.dropout)
    if compiled:
        model.compile_blocks()
    completed = deepspeed_config.complete(deepspeed_settings, settings, plan, count_parameters(model))
    engine = Engine(model, completed, settings.optimizer.weight_decay)
    seed_everything(settings.run.seed + collectives.rank())  # dropout differs between ranks
    return engine


def _fresh(settings: Settings, engine: Engine) -> TrainState:
    """The state of a run that begins, with the weights of another model where the settings name one."""
    if (name := settings.model.init_from) is not None:
        engine.begin_from(collectives.call_on_all_ranks(lambda: weights_for(engine.model.shape, name)))
        log.info(f"initial weights from {name}")
    return TrainState()


def _meter(settings: Settings, engine: Engine, plan: BatchPlan, place: torch.device, from_step: int) -> Meter:
    peak = device.peak_flops(place)
    flops = flops_per_token(engine.model)
    return Meter(
        plan.tokens_per_step, flops, peak and peak * plan.world_size, _past(settings, from_step), engine.moment
    )


def _past(settings: Settings, from_step: int) -> Past:
    """What the run has behind it, up to this start; only rank 0 reports it."""
    starts = started_from(read_starts(settings.run_dir / STARTS)) if collectives.is_main() else []
    pace = Pace(Cadence.of(settings), [*starts, from_step])
    begun = first_start(settings.run_dir / STARTS) if collectives.is_main() else None
    if begun is None:
        return Past(trained_seconds=0.0, begun=time.time(), pace=pace)
    trained = 0.0
    for timed in timed_of(read_metrics(settings.run_dir / METRICS)):
        trained += timed.train
        pace.add(timed)
    return Past(trained, begun, pace)


def _start_text(plan: BatchPlan, restored: Restored | None, origin: Origin) -> str:
    text = f"went on from {restored.generation.tag}" if restored else "started"
    if origin.leave_out:
        text += f" without batches {format_batches(origin.leave_out)} of the data"
    return f"{text}, {plan}"


def _open_dashboard(
    settings: Settings, monitor: Monitor, engine: Engine, plan: BatchPlan, restored: Restored | None, origin: Origin
) -> None:
    hyper_parameters = {
        "parameters": count_parameters(engine.model),
        "world_size": plan.world_size,
        "data": settings.data.dir.name,
        **flat(settings.model_dump(mode="json", include=_HYPER_PARAMETERS)),
    }
    compare = settings.model.preset == "124M" and settings.batch.tokens_per_step == REFERENCE_TOKENS_PER_STEP
    open_dashboard(monitor, to_yaml(public_tree(settings)), hyper_parameters, compare)
    text = _start_text(plan, restored, origin)
    monitor.mark_start(restored.manifest.step if restored else 0, f"{time.strftime(TIME)}: {text}")


def _course(settings: Settings, data: TrainingData) -> loop.Course:
    schedule = settings.schedule
    steps = steps_of(schedule, len(data.windows), data.plan)
    rate = functools.partial(
        learning_rate,
        steps=steps,
        warmup_steps=schedule.warmup_steps,
        max_lr=schedule.max_lr,
        min_lr=schedule.min_lr,
    )
    stop_seconds = 0.8 * settings.supervisor.stop_seconds  # the rest is for the end itself
    return loop.Course(steps, rate, Every(settings.checkpoint.every or steps), stop_seconds)


def _changes(before: dict[str, Any], settings: Settings) -> list[str]:
    """The settings that differ from those a checkpoint was saved under, as ``name old -> new``."""
    old, new = flat(before), flat(public_tree(settings))
    absolute = "run.dir" in old  # an earlier version stored absolute paths: where they lead to now says nothing
    left_out = {_COMMAND, *(PATH_KEYS if absolute else ())}  # an earlier version stored the command as it is
    names = [name for name in new if name not in left_out]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _record_start(settings: Settings, state: TrainState, plan: BatchPlan, steps: int) -> None:
    """Record in the run's directory what was started: the settings in force, and one line per start."""
    write_settings(settings)
    for directory in settings.shared_output_dirs:
        write_owner(directory, settings.run_dir)
    start = {
        "time": time.strftime(TIME),
        "from_step": state.step,
        "run_dir": str(settings.run_dir),
        "steps": steps,
        "world_size": plan.world_size,
        "command": [f"{_COMMAND}={HIDDEN}" if word.startswith(f"{_COMMAND}=") else word for word in sys.argv],
        "versions": library_versions(),
        "git_commit": _git_commit(),
    }
    append_lines(settings.run_dir / STARTS, json.dumps(start).encode() + b"\n")


def _git_commit() -> str | None:
    command = ["git", "-C", str(PROJECT_DIR), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a checkout
    return answer.stdout.strip()
