"""Build the parts of a run and hand them to the loop.

Importing this imports DeepSpeed, which then picks its accelerator: call ``device.choose`` first.
"""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
import time
from typing import Any

import torch

from ds_gpt2 import config, console, deepspeed_file, device, dist, loop
from ds_gpt2.batch import BatchPlan
from ds_gpt2.checkpoint import files
from ds_gpt2.checkpoint.rng import seed_everything
from ds_gpt2.checkpoint.store import Checkpoints, library_versions
from ds_gpt2.config import Settings
from ds_gpt2.data.batches import TrainingData
from ds_gpt2.data.check import check_tokens
from ds_gpt2.data.dataset import Dataset, Windows, open_dataset
from ds_gpt2.engine import Engine, close_process_group, open_process_group
from ds_gpt2.errors import UserError
from ds_gpt2.hooks import Hook, Samples, Validation
from ds_gpt2.meter import Meter
from ds_gpt2.model import GPT2, ModelShape, count_parameters, flops_per_token
from ds_gpt2.monitor import Monitor
from ds_gpt2.schedule import Every, learning_rate
from ds_gpt2.state import TrainState
from ds_gpt2.stop import StopRequest

log = logging.getLogger(__name__)


def run(
    settings: Settings, deepspeed_settings: dict[str, Any], plan: BatchPlan, place: torch.device, resume: str | None
) -> bool:
    """One rank's part of a run. True if the run is done, False if it was stopped on request.

    Raises:
        UserError: on every rank, for whatever the person who started the run can mend.
    """
    open_process_group(place)
    try:
        done = _train(settings, deepspeed_settings, plan, place, resume)
    except UserError:
        close_process_group()
        raise
    close_process_group()
    return done


def _train(
    settings: Settings, deepspeed_settings: dict[str, Any], plan: BatchPlan, place: torch.device, resume: str | None
) -> bool:
    tag = dist.together(lambda: _tag_to_resume(settings, resume))
    dist.together(lambda: _check_directories(settings))
    console.open_log(settings.run_dir / "train.log")
    dataset = dist.together(lambda: open_dataset(settings.data.dir))
    check_tokens(dataset, settings.run_dir / "data_checked.json")
    data = _training_data(settings, dataset, plan, place)
    course = _course(settings, data)
    hooks = _hooks(settings, dataset)

    engine = _engine(settings, deepspeed_settings, plan)
    identity = _identity(settings, dataset)
    checkpoints = Checkpoints(settings.checkpoint_dir, engine, settings.checkpoint.keep_last, identity)
    state = checkpoints.load(tag) if tag else TrainState()
    monitor = Monitor(engine, settings.run_dir / "metrics.jsonl", state.step)
    peak = device.peak_flops(place)
    meter = Meter(plan.tokens_per_step, flops_per_token(engine.model), peak and peak * plan.world_size)
    if dist.is_main():
        _record_start(settings, state, plan)
    log.info(f"run {settings.run.name}: {device.describe(place)}")
    log.info(f"model {count_parameters(engine.model):,} parameters; {plan}; {len(data.windows):,} windows an epoch")
    if tag:
        log.info(f"resumed from {settings.checkpoint_dir / tag}, step {state.step} of {course.steps}")

    stop = StopRequest()
    stop.listen()
    lines = console.StepLines(state.step, course.steps)
    done = loop.train(course, state, engine, data, hooks, monitor, checkpoints, meter, lines, stop)
    lines.close()
    monitor.close()
    newest = settings.checkpoint_dir / str(files.read_latest(settings.checkpoint_dir))
    log.info(f"{'done' if done else 'stopped on request'} at step {state.step} of {course.steps}; checkpoint {newest}")
    engine.close()
    return done


def _tag_to_resume(settings: Settings, resume: str | None) -> str | None:
    """The checkpoint to go on from; None to start afresh, which a run that has checkpoints forbids.

    Args:
        resume: None, "auto", "latest", a step or a tag.

    Raises:
        UserError: nothing to resume, or a run that must not be trained over.
    """
    directory = settings.checkpoint_dir
    latest = files.read_latest(directory)
    if latest is None:
        _check_not_saved_elsewhere(settings)
    if resume is None and latest is not None:
        raise UserError(
            f"run {directory.name} already has checkpoints in {directory}, the newest is {latest}:"
            " go on from it with --resume latest, or choose another run.name"
        )
    if resume is None or resume == "auto":
        return latest
    if resume != "latest":
        return files.rolling_tag(int(resume)) if resume.isdigit() else resume
    if latest is None:
        raise UserError(f"nothing to resume: {directory} has no checkpoint; start without --resume")
    return latest


def _check_not_saved_elsewhere(settings: Settings) -> None:
    """A run of this name whose checkpoints lie in another directory must not lose its history to a new one."""
    previous = settings.run_dir / "config.yaml"
    if not previous.exists():
        return
    elsewhere = config.load_settings(previous).checkpoint_dir
    if elsewhere != settings.checkpoint_dir and files.read_latest(elsewhere) is not None:
        raise UserError(
            f"run {settings.run.name} has its checkpoints in {elsewhere}: set checkpoint.dir={elsewhere.parent} to"
            " go on from them, or choose another run.name"
        )


def _check_directories(settings: Settings) -> None:
    if dist.is_main():
        for directory in settings.output_dirs:
            files.check_writable(directory)


def _training_data(settings: Settings, dataset: Dataset, plan: BatchPlan, place: torch.device) -> TrainingData:
    windows = Windows(dataset, "train", plan.sequence_length)
    return TrainingData(windows, plan, dist.rank(), settings.run.seed, place)


def _hooks(settings: Settings, dataset: Dataset) -> list[Hook]:
    hooks: list[Hook] = []
    if settings.validation.every:
        held_out = Windows(dataset, "val", settings.batch.sequence_length)
        hooks.append(Validation(settings.validation, held_out, settings.batch.micro_batch))
    if settings.samples.every:
        hooks.append(Samples(settings.samples, settings.run.seed))
    return hooks


def _engine(settings: Settings, deepspeed_settings: dict[str, Any], plan: BatchPlan) -> Engine:
    seed_everything(settings.run.seed)
    model = GPT2(ModelShape(*settings.model.shape, plan.sequence_length), settings.model.dropout)
    completed = deepspeed_file.complete(deepspeed_settings, settings, plan)
    engine = Engine(model, completed, settings.optimizer.weight_decay)
    seed_everything(settings.run.seed + dist.rank())  # dropout differs between ranks
    return engine


def _course(settings: Settings, data: TrainingData) -> loop.Course:
    schedule = settings.schedule
    steps = schedule.steps or data.steps_for(schedule.epochs or 0)
    if schedule.warmup_steps >= steps:
        raise UserError(
            f"schedule.warmup_steps {schedule.warmup_steps} must be below the {steps} steps that"
            f" schedule.epochs={schedule.epochs:g} come to with this data"
        )
    rate = functools.partial(
        learning_rate,
        steps=steps,
        warmup_steps=schedule.warmup_steps,
        max_lr=schedule.max_lr,
        min_lr=schedule.min_lr,
    )
    return loop.Course(steps, rate, Every(settings.checkpoint.every or steps))


def _identity(settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """What a resumed run must share with the one that saved: change any of it and it is another experiment."""
    layers, heads, width = settings.model.shape
    return {
        "model.layers": layers,
        "model.heads": heads,
        "model.width": width,
        "batch.sequence_length": settings.batch.sequence_length,
        "batch.tokens_per_step": settings.batch.tokens_per_step,
        "run.seed": settings.run.seed,
        "data": dataset.fingerprint,
    }


def _record_start(settings: Settings, state: TrainState, plan: BatchPlan) -> None:
    """Leave in the run's directory what was started: the settings in force, and one line per start."""
    (settings.run_dir / "config.yaml").write_text(config.dump_settings(settings), encoding="utf-8")
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": state.step,
        "world_size": plan.world_size,
        "command": sys.argv,
        "versions": library_versions(),
        "git_commit": _git_commit(),
    }
    with (settings.run_dir / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _git_commit() -> str | None:
    command = ["git", "-C", str(config.PROJECT_DIR), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a checkout
    return answer.stdout.strip()
