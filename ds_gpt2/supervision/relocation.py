"""Resume a run whose directory was moved, in its new location."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import load_run_settings
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.context import POLL_SECONDS, Context
from ds_gpt2.supervision.run_directories import RunDirectories
from ds_gpt2.supervision.supervised_run import SupervisedRun

_CHECKPOINTS_MOVE_SECONDS = 60.0  # for the directory of checkpoints to be moved after the run's
_MOVED = "DS_GPT2_MOVED"  # environment: the name of a run that is resumed because it was moved


def was_resumed_after_move(run_name: str) -> bool:
    """Return whether this process resumes a run that was moved; later processes do not inherit that."""
    return os.environ.pop(_MOVED, "") == run_name


def command_to_resume(
    context: Context, run: SupervisedRun, step: int | None, has_started: bool, cluster: Cluster | None = None
) -> list[str]:
    """Report that the run's directory was moved or deleted, after all ranks have exited.

    Args:
        step: the newest step; None if no rank was launched.
        has_started: whether the ranks have started to train under this supervisor.
        cluster: the hosts of the ranks; None: this machine.

    Returns:
        The command that resumes the run in its new location; empty if it cannot be resumed.
    """
    directories, report = context.directories, context.reporter.report
    before, now = context.settings.run_dir, directories.run_dir
    if directories.run.is_deleted:
        report("stop", f"{before} was deleted: the run has ended", step)
        return []
    if directories.saved_step() < 0 or not has_started:
        report("stop", f"{before} was moved to {now} before its first checkpoint: start the run again", step)
        return []
    if (problem := _await_checkpoints(context)) is not None:
        report("stop", f"{before} was moved to {now}, but {problem}", step)
        return []
    report("restart", f"{before} was moved to {now}: resuming there", step)
    os.environ[_MOVED] = now.name
    return [*_program(directories.project.path), *run.resume_arguments(now, _num_gpus(context, run, cluster))]


def _num_gpus(context: Context, run: SupervisedRun, cluster: Cluster | None) -> int | None:
    """Return the number of ranks to resume with, as ``--num_gpus`` takes it; None if a hostfile has it."""
    if cluster is None:
        return run.layout.ranks
    return None if context.settings.cluster.hostfile is not None else cluster.spec.hosts[0].slots


def _await_checkpoints(context: Context) -> str | None:
    """Wait for the directory of checkpoints to be moved like that of the run.

    Returns:
        Why the run cannot be resumed from them; None if it can.
    """
    deadline = time.monotonic() + _CHECKPOINTS_MOVE_SECONDS
    while (problem := _checkpoints_problem(context.directories)) is not None:
        if context.stop.requested or time.monotonic() > deadline:
            return problem
        time.sleep(POLL_SECONDS)
    return None


def _checkpoints_problem(directories: RunDirectories) -> str | None:
    """Return why the settings in the new directory do not lead to the run's checkpoints; None if they do."""
    try:
        expected = load_run_settings(directories.run_dir).checkpoint_dir
    except UserError as error:
        return f"{error}; correct that, then resume"
    if expected.is_relative_to(PROJECT_DIR):  # the next process starts in the project where that is now
        expected = directories.project.path / expected.relative_to(PROJECT_DIR)
    with contextlib.suppress(OSError):
        if os.path.samefile(expected, directories.checkpoints.path):
            return None
    return f"its checkpoints are in {directories.checkpoints.path}: move them to {expected}, then resume"


def _program(project: Path) -> list[str]:
    """Return the command of this project in its present location.

    launch.sh adapts an environment inside the project to a move.
    """
    if Path(sys.executable).is_relative_to(PROJECT_DIR) or "DS_GPT2_PYTHON" in os.environ:
        return ["bash", str(project / "launch.sh")]
    return [sys.executable, str(project / "ds_gpt2" / "__main__.py")]
