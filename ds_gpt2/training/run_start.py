"""Record a start: in the run's directory, in TensorBoard, and in the log."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_gpt2.checkpoint.manager import library_versions
from ds_gpt2.checkpoint.resume import Restored
from ds_gpt2.config.batch_plan import BatchPlan, format_batches, steps_of
from ds_gpt2.config.output_owner import write_owner
from ds_gpt2.config.run_location import HIDDEN, located, public_tree, write_settings
from ds_gpt2.config.settings import PATH_KEYS, PROJECT_DIR, ScheduleSettings, Settings, default_values, flat, to_yaml
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import Monitor
from ds_gpt2.monitoring.reference_curves import is_comparable_to_reference
from ds_gpt2.monitoring.tensorboard_layout import open_dashboard
from ds_gpt2.run_dir.fork_record import Fork
from ds_gpt2.run_dir.starts import TIME, append_start
from ds_gpt2.training.lr_change import describe_change
from ds_gpt2.training.lr_schedule import LearningRate

_COMMAND = "alerts.command"  # may contain a password

_HYPER_PARAMETERS: Any = {
    "run": {"seed"},
    "model": True,
    "batch": True,
    "schedule": True,
    "optimizer": {"eps", "weight_decay", "grad_clip"},
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a start begins with."""

    restored: Restored | None  # the checkpoint that the run resumes from; None: a new run
    fork: Fork | None = None  # the run from which this one was forked
    excluded: tuple[int, ...] = ()  # batches of the data that this start excludes from training
    is_first: bool = False  # the run has no earlier start

    @property
    def new_fork(self) -> Fork | None:
        """The run's parent at the first start of a fork; else None."""
        return self.fork if self.is_first else None


def start_text(plan: BatchPlan, origin: Origin) -> str:
    """Return one line for the journal and TensorBoard."""
    text = "started" if origin.restored is None else f"resumed from {origin.restored.generation.tag}"
    if (fork := origin.new_fork) is not None:
        text = f"forked from {fork} ({fork.tag})"
    if origin.excluded:
        text += f", excluding batches {format_batches(origin.excluded)} of the data"
    return f"{text}, {plan}"


def record_start(settings: Settings, state: TrainState, plan: BatchPlan, steps: int) -> None:
    """Write the settings in force to the run's directory, and append a line to ``starts.jsonl``. For rank 0.

    Raises:
        OSError: a file cannot be written.
    """
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
    append_start(settings.run_dir, start)


def write_dashboard(
    monitor: Monitor, settings: Settings, parameters: int, plan: BatchPlan, fork: Fork | None = None
) -> None:
    """Write the parts of TensorBoard's pages that do not change during a run. For rank 0.

    Args:
        parameters: of the model.
        fork: the run's parent, if it was forked.
    """
    hyper_parameters = {
        "parameters": parameters,
        "world_size": plan.world_size,
        "data": ", ".join(source.label for source in settings.data.sources),
        **({} if fork is None else {"forked_from": fork.lineage}),
        **flat(settings.model_dump(mode="json", include=_HYPER_PARAMETERS)),
    }
    open_dashboard(monitor, to_yaml(public_tree(settings)), hyper_parameters, is_comparable_to_reference(settings))


def log_resume(origin: Origin, settings: Settings, windows: int, windows_per_step: int) -> None:
    """Log the checkpoint that a run resumes from, the settings that have changed since, and what follows for its rate.

    Args:
        origin: with a checkpoint.
        windows: of one epoch.
    """
    assert origin.restored is not None
    restored = origin.restored

    def rate_of(schedule: ScheduleSettings) -> LearningRate:
        return LearningRate(schedule, steps_of(schedule, windows, windows_per_step))

    step, before = restored.manifest.step, restored.manifest.settings
    rate = rate_of(settings.schedule)
    log.info(f"resumed from {restored.generation.path}, step {step:,} of {rate.steps:,}")
    since, changes = "changed since then", changed_settings(before, settings)
    if (fork := origin.new_fork) is not None:
        log.info(f"forked from {fork.lineage}; {fork.tag} of {fork.run_dir}")
        since, changes = f"other than in {fork.run}", changed_settings(before, settings, Path(fork.run_dir))
    for change in changes:
        log.info(f"{since}: {change}")
    try:
        rate_before = rate_of(ScheduleSettings.model_validate(before.get("schedule")))
    except ValidationError:  # of another version
        return
    for line in describe_change(rate_before, rate, step):
        log.info(line)


def changed_settings(before: dict[str, Any], settings: Settings, parent: Path | None = None) -> list[str]:
    """Return the settings that differ from those a checkpoint was saved with, as ``name old -> new``.

    Args:
        parent: the directory of another run that has saved the checkpoint; None: this run has.
    """
    stored, new = flat(before), flat(public_tree(settings))
    if parent is not None:
        stored, new = flat(located(before, parent)), flat(located(public_tree(settings), settings.run_dir))
        stored["run.name"] = settings.run.name  # differs by intention
    old = {**default_values(), **stored}  # an earlier version does not have all settings
    absolute = "run.dir" in stored  # an earlier version stored absolute paths, which cannot be compared
    ignored = {_COMMAND, *(PATH_KEYS if absolute else ())}  # an earlier version stored the command as it is
    names = [name for name in new if name not in ignored]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _git_commit() -> str | None:
    command = ["git", "-C", str(PROJECT_DIR), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a checkout
    return answer.stdout.strip()
