"""Decide what a start resumes from, or whether it begins a new run. A saved run never starts from the beginning."""

from __future__ import annotations

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.storage import redacted_reason
from ds_gpt2.checkpoint.catalog import describe_files, newest_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import CONFIG, run_argument
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir.file_checks import read_error
from ds_gpt2.run_dir.fork_record import read_fork
from ds_gpt2.run_dir.journal import JOURNAL, last_saved_step
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.run_dir.starts import read_starts, started_from


class CheckpointsGoneError(UserError):
    """A run was saved before, and its checkpoints are not there: a disk may not be mounted."""


def choose_source(settings: Settings, resume: str | None) -> str | None:
    """Return what to look for among the checkpoints (see ``catalog.candidates``); None to start a new run.

    Args:
        resume: the requested source; None for a new run.

    Raises:
        UserError: a new run is requested, and the run has checkpoints.
        CheckpointsGoneError: a new run would start, and the run was saved before.
    """
    directory = settings.checkpoint_dir
    newest = newest_tag(directory)
    if resume is None and newest is not None:
        known = (settings.run_dir / CONFIG).is_file()
        name = settings.run.name
        command = f"resume {run_argument(settings.run_dir)}" if known else f"train CONFIG run.name={name} --auto"
        raise UserError(
            f"run {name} already has checkpoints in {directory}, the newest is {newest}: resume it"
            f" (`./launch.sh {command}`; ds_gpt2/train.py: --resume latest), or choose another run.name"
        )
    automatic = resume is not None and (resume == "auto" or resume.startswith("before:"))
    if resume is None or (automatic and newest is None and not has_backups(settings)):
        check_never_saved(settings)
        return None
    return resume


def starts_new_run(settings: Settings, resume: str | None) -> bool:
    """Return whether a new run starts: nothing to resume from, and no interrupted save that can be completed.

    Raises:
        UserError: as ``choose_source``.
    """
    return choose_source(settings, resume) is None and not commit.has_unfinished_commit(settings.checkpoint_dir)


def check_never_saved(settings: Settings) -> None:
    """Check that no checkpoint of the run is lost.

    Raises:
        CheckpointsGoneError: the run was saved, and has no checkpoint.
    """
    directory = settings.checkpoint_dir
    if (step := saved_step(settings)) is not None and not commit.has_unfinished_commit(directory):
        fix = describe_files(directory) or "mount or restore it"
        if (fork := read_fork(settings.run_dir)) is not None and not read_starts(settings.run_dir):
            raise CheckpointsGoneError(
                f"run {settings.run.name} is a fork of {fork}, but its checkpoint is not in {directory}: repeat the"
                " command with --fork to complete it, or choose another run.name"
            )
        raise CheckpointsGoneError(
            f"run {settings.run.name} was saved at step {step:,}, but there is no checkpoint in {directory}: {fix}; to"
            f" start a new run, move {settings.run_dir} away or choose another run.name"
        )


def saved_step(settings: Settings) -> int | None:
    """Return the newest step at which the run was saved, by its own records; None if they show no save.

    Raises:
        UserError: a record cannot be read.
    """
    try:
        return _saved_step(settings)
    except NotADirectoryError:  # there is no run; whether its directory can be created is checked later
        return None
    except OSError as error:
        raise read_error(error, settings.run_dir) from None


def _saved_step(settings: Settings) -> int | None:
    if (step := last_saved_step(settings.run_dir)) is not None:
        return step
    if (steps := started_from(read_starts(settings.run_dir))) and steps[-1] > 0:
        return steps[-1]
    if (fork := read_fork(settings.run_dir)) is not None:
        return fork.step  # it began with a checkpoint
    if (settings.run_dir / JOURNAL).exists():
        return None  # it was never saved
    return max((record["step"] for record in read_metrics(settings.run_dir / METRICS)), default=None)


def has_backups(settings: Settings) -> bool:
    """Return whether there are backups of the run's checkpoints.

    Raises:
        UserError: the storage cannot be reached.
    """
    backup = backup_of(settings)
    try:
        return backup is not None and bool(backup.copies())
    except OSError as error:
        raise UserError(f"cannot determine whether {settings.run.name} has backups: {redacted_reason(error)}") from None


def backup_of(settings: Settings) -> Backup | None:
    """Return the run's backups; None if it has none."""
    to = settings.checkpoint.backup.to
    return Backup(to, settings.run.name, settings.checkpoint.backup, run_dir=settings.run_dir) if to else None
