"""Check all that can be known about a start before anything is started or left on the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.storage import reason_of
from ds_gpt2.checkpoint.catalog import candidates, check_identity, newest_tag
from ds_gpt2.checkpoint.naming import LATEST, LATEST_BACKUP, role_of
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.model_names import hub_name
from ds_gpt2.config.run_location import CONFIG, OWNER, is_run_dir, load_run_settings, read_owner
from ds_gpt2.config.settings import ScheduleSettings, Settings
from ds_gpt2.data.dataset import INDEX, Dataset, as_first_read, count_windows_of, open_dataset
from ds_gpt2.data.shards import is_shard
from ds_gpt2.run_dir.journal import JOURNAL, last_saved_step
from ds_gpt2.run_dir.metrics import METRICS, REPLACED, STARTS, read_metrics, read_starts, started_from
from ds_gpt2.run_dir.supervisor_record import RECORD


def check_start(settings: Settings, plan: BatchPlan, resume: str | None) -> None:
    """Check all of a start that needs neither ranks nor writing.

    Args:
        resume: what to resume from, see ``catalog.candidates``; None for a new run.

    Raises:
        UserError: something that the user has to change first.
    """
    check_outputs(settings)
    check_backup(settings)
    wanted = what_to_resume(settings, resume)
    if commit.has_unfinished_commit(settings.checkpoint_dir):
        wanted = None  # which checkpoints there are shows when the run is taken over
    dataset = dataset_of(settings, wanted)
    steps = steps_of(settings.schedule, count_windows_of(dataset, "train", plan.sequence_length), plan)
    if settings.schedule.warmup_steps >= steps:
        raise UserError(
            f"schedule.warmup_steps {settings.schedule.warmup_steps} must be below the {steps} steps of the run"
        )
    if settings.validation.every:
        count_windows_of(dataset, "val", plan.sequence_length)
    if wanted is not None:
        _check_resume(settings, wanted, identity_of(settings, dataset), steps)
    elif begins_anew(settings, resume):
        _check_new_directories(settings)
        if hub_name(settings.model.init_from or "") is None:
            check_initial_model(settings)
    for directory in settings.output_dirs:
        files.check_can_write(directory, full_is_allowed=directory == settings.checkpoint_dir)


def check_initial_model(settings: Settings) -> None:
    """Check the model that a new run begins from, if there is one; one of the hub is downloaded.

    Raises:
        UserError: there is no such model, it is of another shape, or it cannot be downloaded.
    """
    if settings.model.init_from is None:
        return
    from ds_gpt2.model.shape import ModelShape  # imports PyTorch, which `train` needs for nothing else
    from ds_gpt2.pretrained import load

    load.prepare(ModelShape(*settings.model.shape, settings.batch.sequence_length), settings.model.init_from)


def dataset_of(settings: Settings, wanted: str | None) -> Dataset:
    """Return the run's data, as the checkpoints know it that ``wanted`` stands for.

    Raises:
        UserError: the data cannot be read, or there is no such checkpoint.
    """
    dataset = open_dataset(settings.data.dir)
    found = candidates(settings.checkpoint_dir, wanted) if wanted is not None else []
    known = [one.manifest.identity.get("data") for one in found if one.manifest is not None]
    return as_first_read(dataset, str(known[0])) if known else dataset


def steps_of(schedule: ScheduleSettings, windows: int, plan: BatchPlan) -> int:
    """The steps of a whole run.

    Args:
        windows: of an epoch.
    """
    if schedule.steps is not None:
        return schedule.steps
    return plan.steps_for(schedule.epochs or 0, windows)


def identity_of(settings: Settings, dataset: Dataset) -> dict[str, Any]:
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


_RECORDS = frozenset((METRICS, REPLACED, STARTS, JOURNAL, RECORD, INDEX))
_POINTERS = frozenset((LATEST, LATEST_BACKUP, OWNER))


class CheckpointsGoneError(UserError):
    """A run has been saved, and its checkpoints are not there: a disk may not be mounted."""


def what_to_resume(settings: Settings, resume: str | None) -> str | None:
    """What to look for among the checkpoints; None to start a new run, which is refused where there are checkpoints.

    Raises:
        UserError: a run must not be trained over.
        CheckpointsGoneError: ``resume`` is automatic, and would begin a run anew that has been saved before.
    """
    directory = settings.checkpoint_dir
    newest = newest_tag(directory)
    if resume is None and newest is not None:
        known = (settings.run_dir / CONFIG).is_file()
        command = f"resume {directory.name}" if known else f"train CONFIG run.name={directory.name} --auto"
        raise UserError(
            f"run {directory.name} already has checkpoints in {directory}, the newest is {newest}: resume it"
            f" (`./launch.sh {command}`, or --resume latest), or choose another run.name"
        )
    automatic = resume is not None and (resume == "auto" or resume.startswith("before:"))
    if resume is None or (automatic and newest is None and not has_copies(settings)):
        _check_not_saved_before(settings)
        return None
    return resume


def _check_not_saved_before(settings: Settings) -> None:
    """
    Raises:
        CheckpointsGoneError: the run was saved, and no checkpoint of it is there.
    """
    if (step := saved_step(settings)) is not None and not commit.has_unfinished_commit(settings.checkpoint_dir):
        raise CheckpointsGoneError(
            f"run {settings.run.name} was saved at step {step:,}, but there is no checkpoint in"
            f" {settings.checkpoint_dir}: mount or restore it; to start a new run, move {settings.run_dir} away or"
            " choose another run.name"
        )


def saved_step(settings: Settings) -> int | None:
    """The newest step that the run is known to have been saved at, by its own records; None if by none of them.

    Raises:
        UserError: a record cannot be read.
    """
    try:
        return _saved_step(settings)
    except NotADirectoryError:  # there is no run: whether it can be made is checked later
        return None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; check its permissions and disk") from None


def _saved_step(settings: Settings) -> int | None:
    if (step := last_saved_step(settings.run_dir)) is not None:
        return step
    if (steps := started_from(read_starts(settings.run_dir / STARTS))) and steps[-1] > 0:
        return steps[-1]
    if (settings.run_dir / JOURNAL).exists():
        return None  # it was never saved
    return max((record["step"] for record in read_metrics(settings.run_dir / METRICS)), default=None)


def begins_anew(settings: Settings, resume: str | None) -> bool:
    """Whether a new run begins, with nothing to resume from now or when a save that a crash cut short is finished.

    Raises:
        UserError: a run must not be trained over.
    """
    return what_to_resume(settings, resume) is None and not commit.has_unfinished_commit(settings.checkpoint_dir)


def has_copies(settings: Settings) -> bool:
    """Whether there are backups of the run's checkpoints."""
    backup = backup_of(settings)
    try:
        return backup is not None and bool(backup.copies())
    except OSError as error:
        raise UserError(f"cannot tell whether {settings.run.name} has backups: {reason_of(error)}") from None


def backup_of(settings: Settings) -> Backup | None:
    """Where the run's backups go; None if it has none."""
    to = settings.checkpoint.backup.to
    return Backup(to, settings.run.name, settings.checkpoint.backup, run_dir=settings.run_dir) if to else None


def check_backup(settings: Settings) -> None:
    """Check where the run's backups go, without connecting to anything; a directory may still be mounted later.

    Raises:
        UserError: no backup can ever be made there.
    """
    try:
        if (backup := backup_of(settings)) is not None:
            backup.check_named(settings.checkpoint_dir)
    except UserError as error:
        raise UserError(f"checkpoint.backup.to: {error}") from None


def check_outputs(settings: Settings) -> None:
    """Check that the run's output directories are its own.

    Raises:
        UserError: another run writes there, or the run's checkpoints are where it was before it moved.
    """
    for directory in settings.shared_output_dirs:
        if (other := _other_owner(directory, settings)) is not None:
            key = "checkpoint.dir" if directory == settings.checkpoint_dir else "monitor.dir"
            raise UserError(
                f"{directory} belongs to the run in {other}, not to the one in {settings.run_dir}: set {key} to another"
                " directory, or choose another run.name"
            )
    if (left := _checkpoints_left_behind(settings)) is not None:
        verb = "move" if run_location.run_of(left) in (None, settings.run_dir) else "copy"
        raise UserError(
            f"run {settings.run.name} has no checkpoints in {settings.checkpoint_dir}, but it left some in {left}:"
            f" {verb} that directory to {settings.checkpoint_dir}"
            + (f", or set checkpoint.dir={left.parent}" if left.name == settings.run.name else "")
        )


def _check_new_directories(settings: Settings) -> None:
    """
    Raises:
        UserError: a new run would overwrite or delete files of something else.
    """
    if not (settings.run_dir / CONFIG).is_file():
        _check_none(settings.run_dir, lambda name: name in _RECORDS or is_shard(name), "run.name")
    if read_owner(settings.checkpoint_dir) is None:
        _check_none(settings.checkpoint_dir, lambda name: name in _POINTERS or role_of(name), "checkpoint.dir")


def _check_none(directory: Path, is_in_the_way: Callable[[str], object], setting: str) -> None:
    with contextlib.suppress(OSError):  # whether it can be written to is checked next
        for name in sorted(os.listdir(directory)):
            if is_in_the_way(name):
                raise UserError(f"{directory} has {name} of something else: choose another {setting}")


def _other_owner(directory: Path, settings: Settings) -> Path | None:
    """The directory of another run that writes into ``directory``; None if there is none."""
    run_dir = settings.run_dir.resolve()
    if (owner := read_owner(directory)) is not None:
        moved = owner.directory != directory.resolve()  # copied or moved, together with its run
        return owner.run_dir if not moved and owner.run_dir != run_dir and is_run_dir(owner.run_dir) else None
    if not (settings.run_dir / CONFIG).is_file() or not directory.is_dir():
        return None
    before = run_location.last_seen(settings.run_dir)  # no owner is recorded: an earlier version's
    if before.resolve() == run_dir or not is_run_dir(before):
        return None
    try:
        theirs = load_run_settings(before).shared_output_dirs
    except UserError:  # its settings cannot be read: nothing says that it writes there
        return None
    return before if directory.resolve() in [path.resolve() for path in theirs] else None


def _checkpoints_left_behind(settings: Settings) -> Path | None:
    """Checkpoints of the run in another directory than its own, which has none; None if there are none."""
    if newest_tag(settings.checkpoint_dir) is not None or commit.has_unfinished_commit(settings.checkpoint_dir):
        return None
    if not (settings.run_dir / CONFIG).is_file():
        return None
    places = [load_run_settings(settings.run_dir).checkpoint_dir]
    places += run_location.checkpoint_dirs_before(settings.run_dir)
    places.append(settings.checkpoint.dir / run_location.last_seen(settings.run_dir).name)
    return next((path for path in places if path != settings.checkpoint_dir and newest_tag(path) is not None), None)


def _check_resume(settings: Settings, wanted: str, identity: dict[str, Any], steps: int) -> None:
    found = candidates(settings.checkpoint_dir, wanted)
    if not found and not has_copies(settings):
        _check_not_saved_before(settings)
        raise UserError(f"nothing to resume: {settings.checkpoint_dir} has no checkpoint; start a new run instead")
    first = next((one for one in found if one.manifest is not None), None)
    if first is None or first.manifest is None:
        return
    check_identity(first, first.manifest, identity)
    if first.step > steps:
        raise UserError(
            f"{first.tag} is at step {first.step}, beyond the {steps} steps of the run: set schedule.steps to more, or"
            " resume from an older checkpoint with --from STEP"
        )
