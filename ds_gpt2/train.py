"""One rank of a training run: ``deepspeed --num_gpus 4 ds_gpt2/train.py --config ds_configs/gpt2_124m.yaml``."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # started as a file by DeepSpeed's launcher: import from the project, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_gpt2 import config, device, dist, model, outcome
from ds_gpt2.batch import BatchPlan, plan_batch
from ds_gpt2.config import Settings
from ds_gpt2.data.batches import TrainingData
from ds_gpt2.data.check import check_tokens
from ds_gpt2.data.dataset import Dataset, Windows, open_dataset
from ds_gpt2.deepspeed_file import complete, load_deepspeed_file
from ds_gpt2.errors import UserError
from ds_gpt2.schedule import Every, learning_rate
from ds_gpt2.state import TrainState
from ds_gpt2.stop import StopRequest, die_silently

log = logging.getLogger("ds_gpt2.train")


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, train; returns the exit code."""
    die_silently()
    try:
        options, extra = parser().parse_known_args(arguments)
        settings = config.load_settings(Path(options.config), _overrides(options, extra))
        if options.print_config:
            if dist.is_main():
                print(config.dump_settings(settings), end="")
            return outcome.DONE
        code = outcome.DONE if run(settings, options.resume) else outcome.STOPPED
    except UserError as error:
        if dist.is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = outcome.MISTAKE
    if dist.is_main():
        outcome.leave(code)
    return code


def parser() -> argparse.ArgumentParser:
    """The command line, with the flags that torchrun-style scripts have."""
    result = argparse.ArgumentParser(
        prog="ds_gpt2/train.py", description=__doc__, allow_abbrev=False, epilog="Any setting may follow as key=value."
    )
    result.add_argument("--config", required=True, metavar="YAML")
    result.add_argument("--resume", nargs="?", const="latest", metavar="latest|auto|STEP|TAG", help="go on from there")
    result.add_argument("--run_name", metavar="NAME", help="run.name")
    result.add_argument("--checkpoint_freq", metavar="STEPS", help="checkpoint.every")
    result.add_argument("--checkpoint_dir", metavar="DIR", help="checkpoint.dir")
    result.add_argument("--eval_freq", metavar="STEPS", help="validation.every")
    result.add_argument("--tensorboard_dir", metavar="DIR", help="monitor.dir")
    result.add_argument("--use_tensorboard", nargs="?", const="true", metavar="true|false", help="monitor.tensorboard")
    result.add_argument("--print-config", action="store_true", help="show the settings that result, and end")
    result.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return result


_FLAGS = {
    "run_name": "run.name",
    "checkpoint_freq": "checkpoint.every",
    "checkpoint_dir": "checkpoint.dir",
    "eval_freq": "validation.every",
    "tensorboard_dir": "monitor.dir",
    "use_tensorboard": "monitor.tensorboard",
}


def _overrides(options: argparse.Namespace, extra: list[str]) -> dict[str, str]:
    flags = {key: value for flag, key in _FLAGS.items() if (value := getattr(options, flag)) is not None}
    return {**flags, **config.parse_overrides(extra)}


def run(settings: Settings, resume: str | None) -> bool:
    """Build the parts, hand them to the loop. True if the run is done, False if it was stopped on request."""
    deepspeed_file = load_deepspeed_file(settings.deepspeed)
    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, dist.world_size())
    place = device.choose(settings.run.device)

    # Only now: DeepSpeed picks its accelerator when it is imported.
    from ds_gpt2 import console, loop
    from ds_gpt2.checkpoint import files
    from ds_gpt2.checkpoint.rng import seed_everything
    from ds_gpt2.checkpoint.store import Checkpoints, library_versions
    from ds_gpt2.engine import Engine, open_process_group
    from ds_gpt2.hooks import Hook, Samples, Validation
    from ds_gpt2.meter import Meter
    from ds_gpt2.monitor import Monitor

    open_process_group(place)
    dist.together(lambda: _check_directories(settings))
    console.open_log(settings.run_dir / "train.log")
    tag = dist.together(lambda: _tag_to_resume(settings.checkpoint_dir, resume))
    dataset = dist.together(lambda: open_dataset(settings.data.dir))
    windows = Windows(dataset, "train", batch.sequence_length)
    check_tokens(dataset, settings.run_dir / "data_checked.json")
    data = TrainingData(windows, plan, dist.rank(), settings.run.seed, place)
    steps = settings.schedule.steps or data.steps_for(settings.schedule.epochs or 0)
    lr = functools.partial(learning_rate, steps=steps, **_curve(settings))
    hooks: list[Hook] = []
    if settings.validation.every:
        held_out = Windows(dataset, "val", batch.sequence_length)
        every = Every(settings.validation.every)
        hooks.append(Validation(held_out, every, settings.validation.tokens, batch.micro_batch))
    if settings.samples.every and settings.samples.prompts:
        hooks.append(Samples(settings.samples, settings.run.seed))

    seed_everything(settings.run.seed)
    gpt2 = model.GPT2(_shape(settings), settings.model.dropout)
    engine = Engine(gpt2, complete(deepspeed_file, settings, plan), settings.optimizer.weight_decay, batch.reduce_once)
    seed_everything(settings.run.seed + dist.rank())  # dropout differs between ranks
    identity = _identity(settings, dataset)
    checkpoints = Checkpoints(settings.checkpoint_dir, engine, settings.checkpoint.keep_last, identity)
    state = checkpoints.load(tag) if tag else TrainState()
    monitor = Monitor(engine, settings.run_dir / "metrics.jsonl", state.step)
    peak = device.peak_flops(place)
    meter = Meter(plan.tokens_per_step, model.flops_per_token(gpt2), peak and peak * plan.world_size)
    if dist.is_main():
        _record_start(settings, library_versions(), state, plan)
    log.info(f"run {settings.run.name}: {device.describe(place)}")
    log.info(f"model {model.count_parameters(gpt2):,} parameters; {plan}; {len(windows):,} windows an epoch")
    if tag:
        log.info(f"resumed from {settings.checkpoint_dir / tag}, step {state.step} of {steps}")

    stop = StopRequest()
    stop.listen()
    lines = console.StepLines(state.step, steps)
    save = Every(settings.checkpoint.every or steps)
    done = loop.train(loop.Plan(steps, lr, save), state, engine, data, hooks, monitor, checkpoints, meter, lines, stop)
    lines.close()
    monitor.close()
    newest = settings.checkpoint_dir / (files.read_latest(settings.checkpoint_dir) or "")
    log.info(f"{'done' if done else 'stopped on request'} at step {state.step} of {steps}; newest checkpoint {newest}")
    engine.close()
    return done


def _shape(settings: Settings) -> model.ModelShape:
    return model.ModelShape(*settings.model.shape, settings.batch.sequence_length)


def _curve(settings: Settings) -> dict[str, Any]:
    schedule = settings.schedule
    return {"warmup_steps": schedule.warmup_steps, "max_lr": schedule.max_lr, "min_lr": schedule.min_lr}


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


def _check_directories(settings: Settings) -> None:
    from ds_gpt2.checkpoint import files

    if dist.is_main():
        for directory in (settings.run_dir, settings.checkpoint_dir, settings.tensorboard_dir):
            files.check_writable(directory)


def _tag_to_resume(directory: Path, resume: str | None) -> str | None:
    """The checkpoint to go on from; None to start afresh, which an existing run's directory forbids."""
    from ds_gpt2.checkpoint import files

    latest = files.read_latest(directory)
    if resume is None:
        if latest:
            raise UserError(
                f"run {directory.name} already has checkpoints in {directory}, the newest is {latest}:"
                " go on from it with --resume latest, or choose another run.name"
            )
        return None
    if resume == "auto":
        return latest
    if resume != "latest":
        return files.rolling_tag(int(resume)) if resume.isdigit() else resume
    if latest is None:
        raise UserError(f"nothing to resume: {directory} has no checkpoint; start without --resume")
    return latest


def _record_start(settings: Settings, versions: dict[str, str], state: TrainState, plan: BatchPlan) -> None:
    """Leave in the run's directory what was started: the settings in force, and one line per start."""
    (settings.run_dir / "config.yaml").write_text(config.dump_settings(settings), encoding="utf-8")
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": state.step,
        "world_size": plan.world_size,
        "command": sys.argv,
        "versions": versions,
        "git_commit": _git_commit(),
    }
    with (settings.run_dir / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(config.PROJECT_DIR), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a checkout
    return answer.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
