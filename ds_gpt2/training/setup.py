"""Build the parts of a run and connect them to a ``Trainer``.

Importing this module imports DeepSpeed, which then selects its accelerator: call ``device.choose`` first.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_gpt2.checkpoint.catalog import Generation, candidates
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manager import Checkpoints
from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.checkpoint.resume import choose_checkpoint
from ds_gpt2.common import files, locks
from ds_gpt2.common.locks import Lock
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config import deepspeed_config
from ds_gpt2.config.batch_plan import BatchPlan, steps_of
from ds_gpt2.config.interval import Every
from ds_gpt2.config.output_owner import write_owner
from ds_gpt2.config.run_location import public_tree, write_first_settings
from ds_gpt2.config.settings import LOG, Settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import HeldOut
from ds_gpt2.data.verify_on_ranks import check_shards
from ds_gpt2.distributed import collectives, device
from ds_gpt2.distributed.peak_flops import peak_flops
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.rng_state import rank_seed, seed_everything
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2, flops_per_token
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.monitoring import console
from ds_gpt2.monitoring.monitor import Monitor
from ds_gpt2.monitoring.pace import Cadence, Pace, timed_of
from ds_gpt2.monitoring.step_reporter import StepReporter
from ds_gpt2.monitoring.step_timer import EarlierTime, StepTimer
from ds_gpt2.monitoring.trackers import Tracker, open_trackers
from ds_gpt2.pretrained.load import weights_for
from ds_gpt2.run_dir.fork_record import read_fork
from ds_gpt2.run_dir.heartbeat import Heartbeat, enable_stack_dumps
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.run_dir.metrics import METRICS, UNWRITTEN, read_metrics
from ds_gpt2.run_dir.starts import TIME, first_start, read_starts, started_from
from ds_gpt2.run_dir.stop_request import STOP_FILE, StopRequest
from ds_gpt2.training.evaluation_attempts import EvaluationAttempts
from ds_gpt2.training.evaluator import Evaluator
from ds_gpt2.training.guards import Guard
from ds_gpt2.training.hooks import (
    AveragedValidation,
    Health,
    Histograms,
    Hook,
    Samples,
    Validation,
    open_evaluations,
    open_hellaswag,
)
from ds_gpt2.training.lr_schedule import LearningRate
from ds_gpt2.training.preflight import check_initial_model
from ds_gpt2.training.progress import Progress, is_stopped
from ds_gpt2.training.reports import report_anomaly, report_data_error, report_failed_evaluation
from ds_gpt2.training.resume_choice import backup_of, choose_source, starts_new_run
from ds_gpt2.training.run_identity import data_of, identity_of
from ds_gpt2.training.run_start import Origin, log_resume, record_start, start_text, write_dashboard
from ds_gpt2.training.trainer import Trainer, TrainingSchedule

log = logging.getLogger(__name__)

_SAVE_SHARE = 0.8  # of supervisor.stop_seconds, for the last save; the rest is for closing the run


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines one rank's part of a run."""

    settings: Settings
    deepspeed_settings: dict[str, Any]  # content of the DeepSpeed file
    plan: BatchPlan
    device: torch.device
    is_compiled: bool
    resume: str | None = None  # what to resume from, see ``catalog.candidates``; None: a new run
    excluded: tuple[int, ...] = ()  # batches of the data to exclude from training


@dataclass(frozen=True)
class BuiltRun:
    """A run that is ready to train."""

    trainer: Trainer
    state: TrainState
    journal: Journal
    lock: Lock | None  # on rank 0: held until the run has ended


@dataclass(frozen=True)
class _RunFiles:
    """The run's directories, which this start owns."""

    heartbeat: Heartbeat
    journal: Journal
    checkpoints: CheckpointDirectory
    lock: Lock | None  # on rank 0


@dataclass(frozen=True)
class _RunData:
    """The run's data, as its checkpoints have recorded it."""

    training: TrainingData
    held_out: Callable[[], list[HeldOut]]
    identity: dict[str, Any]
    source: str | None  # what to resume from, see ``catalog.candidates``


def build_run(spec: RunSpec, cleanup: contextlib.ExitStack) -> BuiltRun:
    """Build the parts of a run, restore its state, and record the start. The process group must be open.

    Args:
        cleanup: receives what must be closed however the run ends.

    Raises:
        UserError: on every rank, for mistakes that the user can fix.
    """
    settings = spec.settings
    run_files = _claim_run(spec, cleanup)
    stop = _stop_request(settings)
    data = _open_data(spec, run_files, stop)
    backup = backup_of(settings)
    restored = choose_checkpoint(settings.checkpoint_dir, data.source, data.identity, backup) if data.source else None
    run_files.heartbeat.beat()
    engine = _build_engine(spec)
    run_files.heartbeat.beat()
    run_settings = public_tree(settings)
    checkpoints = Checkpoints(run_files.checkpoints, engine, data.identity, run_settings, backup, run_files.journal)
    state = checkpoints.load(restored) if restored else _new_state(settings, engine)
    state.exclude(spec.excluded)
    fork = collectives.broadcast_from_main(lambda: read_fork(settings.run_dir))
    if fork is not None:
        state.forget_best_before(fork.step)
    schedule = _schedule(settings, data.training)
    monitor = _open_monitor(spec, engine, checkpoints, state, cleanup)
    progress = Progress(run_files.heartbeat, stop, settings.run_dir / STOP_FILE)
    evaluator = Evaluator(
        _build_hooks(settings, data.held_out, engine, progress),
        EvaluationAttempts(settings.run_dir),
        functools.partial(report_failed_evaluation, run_files.journal),
    )
    timer, lines = _build_timer(spec, engine, state.step), console.StepLines(state.step, schedule.steps)
    reporter = StepReporter(run_files.heartbeat, timer, lines, monitor, schedule.steps)
    guard = Guard(settings.guards, functools.partial(report_anomaly, run_files.journal))
    stop.listen()
    trainer = Trainer(schedule, engine, data.training, guard, evaluator, checkpoints, reporter, stop)
    is_first = collectives.is_main() and not read_starts(settings.run_dir)
    origin = Origin(restored, fork, spec.excluded, is_first)
    _record_start(spec, trainer, state, origin, run_files.journal)
    return BuiltRun(trainer, state, run_files.journal, run_files.lock)


def _record_start(spec: RunSpec, trainer: Trainer, state: TrainState, origin: Origin, journal: Journal) -> None:
    """Record the start in the run's directory, its journal, TensorBoard and the log."""
    settings, plan, steps = spec.settings, spec.plan, trainer.schedule.steps
    parameters = trainer.engine.model.shape.parameters
    collectives.barrier()  # once the start is recorded, any rank must accept a stop
    if collectives.is_main():
        record_start(settings, state, plan, steps)
        text = start_text(plan, origin)
        write_dashboard(trainer.reporter.monitor, settings, parameters, plan, origin.fork)
        trainer.reporter.monitor.mark_start(state.step, f"{time.strftime(TIME)}: {text}")
        journal.write("start", text, state.step, left_out=state.left_out)
    log.info(f"run {settings.run.name}: {device.describe(spec.device)}{', compiled' if spec.is_compiled else ''}")
    log.info(f"model {parameters:,} parameters; {plan}; {len(trainer.data.windows):,} windows per epoch")
    if origin.restored is not None:
        log_resume(origin, settings, len(trainer.data.windows), plan.windows_per_step)


def _claim_run(spec: RunSpec, cleanup: contextlib.ExitStack) -> _RunFiles:
    """Check and create the run's directories, open its log and journal, and lock it against other processes."""
    settings = spec.settings
    if settings.model.init_from is not None and collectives.broadcast_from_main(
        lambda: starts_new_run(settings, spec.resume)
    ):
        collectives.broadcast_slow_from_main(lambda: check_initial_model(settings))  # downloads a model from the hub
    collectives.call_on_all_ranks(lambda: _check_directories(settings))
    heartbeat, journal = Heartbeat(settings.run_dir, collectives.rank()), Journal(settings.run_dir)
    enable_stack_dumps(settings.run_dir, collectives.rank())
    console.open_log(settings.run_dir / LOG)
    restore_directory = functools.partial(_restore_checkpoint_dir, settings, journal, cleanup)
    checkpoints = CheckpointDirectory(Disk(), settings.checkpoint_dir, settings.checkpoint, restore_directory)
    lock = collectives.call_on_all_ranks(lambda: _lock_checkpoints(settings, checkpoints))
    return _RunFiles(heartbeat, journal, checkpoints, lock)


def _check_directories(settings: Settings) -> None:
    if collectives.is_main():
        for directory in settings.output_dirs:
            files.check_writable(directory)
        write_first_settings(settings)


def _lock_checkpoints(settings: Settings, checkpoints: CheckpointDirectory) -> Lock | None:
    """On rank 0, lock the run's checkpoints, and complete or remove interrupted saves."""
    if not collectives.is_main():
        return None
    lock = locks.lock(checkpoints.directory / LOCK, f"run {settings.run.name}")
    checkpoints.start()
    return lock


def _restore_checkpoint_dir(settings: Settings, journal: Journal, cleanup: contextlib.ExitStack, text: str) -> None:
    """Mark and lock the checkpoint directory again after it was deleted and created again."""
    log.error(text)
    journal.write("no_checkpoints", text)
    write_owner(settings.checkpoint_dir, settings.run_dir)
    cleanup.enter_context(locks.lock(settings.checkpoint_dir / LOCK, f"run {settings.run.name}"))


def _stop_request(settings: Settings) -> StopRequest:
    if not collectives.is_main():
        return StopRequest()
    stop = StopRequest(OpenDirectory(settings.run_dir), OpenDirectory(settings.checkpoint_dir))
    if not stop.is_supervised:  # a supervisor has cleared it before, and a request since then counts
        stop.clear()
    return stop


def _open_data(spec: RunSpec, run_files: _RunFiles, stop: StopRequest) -> _RunData:
    """Choose what to resume from, and open and check the data that belongs to it."""
    settings, plan = spec.settings, spec.plan
    source = collectives.broadcast_from_main(lambda: choose_source(settings, spec.resume))
    run_files.heartbeat.beat()
    data = collectives.call_on_all_ranks(lambda: data_of(settings, _candidates(settings, source)))
    for dataset in data.datasets:
        check_shards(dataset, settings.run_dir / data.record_name(dataset))
    run_files.heartbeat.beat()
    report = functools.partial(report_data_error, run_files.journal)
    stopped = functools.partial(is_stopped, stop, settings.run_dir / STOP_FILE)

    windows = data.windows("train", plan.sequence_length, report, stopped)
    mixture = data.mixture(plan.sequence_length, plan.windows_per_step, settings.run.seed)
    training = TrainingData(windows, plan, collectives.rank(), settings.run.seed, spec.device, mixture)
    return _RunData(
        training,
        lambda: data.held_out(plan.sequence_length, report, stopped),
        identity_of(settings, data),
        source,
    )


def _candidates(settings: Settings, source: str | None) -> list[Generation]:
    """Return the checkpoints to resume from; none for a new run."""
    return candidates(settings.checkpoint_dir, source) if source is not None else []


def _build_engine(spec: RunSpec) -> Engine:
    settings, plan = spec.settings, spec.plan
    seed_everything(settings.run.seed)
    model = GPT2(ModelShape(*settings.model.shape, plan.sequence_length), settings.model.dropout)
    if spec.is_compiled:
        model.compile_blocks()
    completed = deepspeed_config.complete(spec.deepspeed_settings, settings, plan, model.shape.parameters)
    engine = Engine(model, completed, settings.optimizer.weight_decay, settings.ema.decay)
    seed_everything(rank_seed(settings.run.seed, step=0))
    return engine


def _new_state(settings: Settings, engine: Engine) -> TrainState:
    """Return the state of a new run, with the initial weights of another model if the settings name one."""
    if (name := settings.model.init_from) is not None:
        engine.set_weights(collectives.call_on_all_ranks(lambda: weights_for(engine.model.shape, name)))
        log.info(f"initial weights from {name}")
    return TrainState()


def _schedule(settings: Settings, data: TrainingData) -> TrainingSchedule:
    schedule = settings.schedule
    steps = steps_of(schedule, len(data.windows), data.plan.windows_per_step)
    stop_seconds = _SAVE_SHARE * settings.supervisor.stop_seconds
    return TrainingSchedule(
        steps, LearningRate(schedule, steps), Every(settings.checkpoint.every or steps), stop_seconds
    )


def _open_monitor(
    spec: RunSpec, engine: Engine, checkpoints: Checkpoints, state: TrainState, cleanup: contextlib.ExitStack
) -> Monitor:
    settings = spec.settings
    trackers = collectives.call_on_all_ranks(lambda: _open_trackers(spec, state))
    monitor = Monitor(
        engine.monitors,
        settings.run_dir / METRICS,
        state.recorded_step,
        trackers,
        fallback_file=lambda: checkpoints.directory / UNWRITTEN,
    )
    cleanup.push(lambda kind, error, trace: monitor.close(failed=kind is not None))
    return monitor


def _open_trackers(spec: RunSpec, state: TrainState) -> dict[str, Tracker]:
    if not collectives.is_main():
        return {}
    run = spec.settings.run
    run_dir = spec.settings.run_dir
    return open_trackers(spec.deepspeed_settings, run_dir, run.name, state.step, spec.plan.windows_per_step)


def _build_timer(spec: RunSpec, engine: Engine, step: int) -> StepTimer:
    peak = peak_flops(spec.device)
    total_peak = peak and peak * spec.plan.world_size
    flops = flops_per_token(engine.model)
    earlier = _earlier_time(spec.settings, step)
    return StepTimer(spec.plan.tokens_per_step, flops, total_peak, earlier, engine.record_event)


def _earlier_time(settings: Settings, step: int) -> EarlierTime:
    """Return the times of earlier starts, for a start at ``step``; only rank 0 reports them."""
    starts = started_from(read_starts(settings.run_dir)) if collectives.is_main() else []
    pace = Pace(Cadence.of(settings), [*starts, step])
    started = first_start(settings.run_dir) if collectives.is_main() else None
    if started is None:
        return EarlierTime(trained_seconds=0.0, first_start=time.time(), pace=pace)
    trained = 0.0
    for timed in timed_of(read_metrics(settings.run_dir / METRICS)):
        trained += timed.train
        pace.add(timed)
    return EarlierTime(trained, started, pace)


def _build_hooks(
    settings: Settings, held_out: Callable[[], list[HeldOut]], engine: Engine, progress: Callable[[], None]
) -> list[Hook]:
    hooks: list[Hook] = [Health(engine.device)]
    if settings.histograms.every:  # before the hooks that a stop may interrupt: it cannot be repeated
        hooks.append(Histograms(settings.histograms, engine.model))
    if settings.validation.every:
        validation = Validation(settings.validation, held_out(), settings.batch.micro_batch)
        hooks += [validation, AveragedValidation(validation)] if engine.average is not None else [validation]
    if settings.samples.every:
        directory, context = settings.run_dir / "samples", settings.batch.sequence_length
        hooks.append(Samples(settings.samples, settings.run.seed, directory, context))
    if settings.hellaswag.every:
        hellaswag = open_hellaswag(settings.hellaswag, engine.model, settings.run_dir)
        hooks += [hellaswag] if hellaswag is not None else []
    hooks += open_evaluations(settings.evaluations, engine.model, settings.run_dir)
    for hook in hooks:
        hook.progress = progress
    return hooks
