"""Check a start as far as possible before anything is started or written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import Generation, candidates, check_identity, nothing_to_resume, step_limit
from ds_gpt2.checkpoint.naming import LATEST, LATEST_BACKUP, role_of
from ds_gpt2.checkpoint.output_check import check_outputs
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import BatchPlan, check_schedule, format_batches, steps_of
from ds_gpt2.config.model_names import hub_name
from ds_gpt2.config.output_owner import OWNER, read_owner
from ds_gpt2.config.run_location import CONFIG
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.dataset import INDEX
from ds_gpt2.data.shards import is_shard
from ds_gpt2.data.sources import Sources
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir.file_checks import check_files
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.metrics import METRICS, REPLACED
from ds_gpt2.run_dir.starts import STARTS
from ds_gpt2.run_dir.supervisor_record import RECORD
from ds_gpt2.training.resume_choice import backup_of, check_never_saved, choose_source, has_backups, starts_new_run
from ds_gpt2.training.run_identity import data_of, identity_of


def check_start(settings: Settings, plan: BatchPlan, resume: str | None) -> None:
    """Check everything about a start that needs neither ranks nor writing.

    Args:
        resume: what to resume from, see ``catalog.candidates``; None for a new run.

    Raises:
        UserError: the user has to change something first.
    """
    check_outputs(settings)
    check_files(settings.run_dir)
    check_backup(settings)
    source = choose_source(settings, resume)
    if commit.has_unfinished_commit(settings.checkpoint_dir):
        source = None  # the ranks complete or remove interrupted saves first
    found = _candidates(settings, source) if source is not None else []
    data, steps = check_data(settings, plan, found)
    if source is not None:
        _check_resume(found, identity_of(settings, data), steps)
    elif starts_new_run(settings, resume):
        check_new_directories(settings)
        if hub_name(settings.model.init_from or "") is None:
            check_initial_model(settings)
    check_can_write(settings)


def check_data(settings: Settings, plan: BatchPlan, found: Sequence[Generation]) -> tuple[Sources, int]:
    """Return the run's data and its number of steps, after checking that they fit the settings.

    Args:
        found: the checkpoints to begin with, the first choice first; empty for a new run.

    Raises:
        UserError: the data cannot be read, or do not fit.
    """
    data = data_of(settings, found)
    steps = steps_of(settings.schedule, data.count("train", plan.sequence_length), plan.windows_per_step)
    check_schedule(settings.schedule, steps)
    data.check_limits(plan.sequence_length, plan.windows_per_step, steps)
    if settings.validation.every:
        data.count("val", plan.sequence_length)
    return data, steps


def check_can_write(settings: Settings) -> None:
    """Check that the output directories can be created and written; that of checkpoints may be full.

    Raises:
        UserError: one cannot.
    """
    for directory in settings.output_dirs:
        files.check_can_write(directory, full_is_allowed=directory == settings.checkpoint_dir)


def check_source(settings: Settings, source: str, leave_out: Sequence[int] = ()) -> None:
    """Check that a run can be read and has a checkpoint to resume from, before its ranks are chosen.

    Args:
        source: see ``catalog.candidates``.
        leave_out: batches of the data to exclude from training.

    Raises:
        UserError: there is no such checkpoint, it was trained on ``leave_out``, or the files of the run cannot be read
            and written.
    """
    check_outputs(settings)
    check_files(settings.run_dir)
    if commit.has_unfinished_commit(settings.checkpoint_dir):
        return  # the ranks complete or remove interrupted saves first
    found = _candidates(settings, source)
    limit = step_limit(source)
    if found and limit is not None and found[0].step >= limit:  # only a rollback takes a later one
        raise UserError(
            f"no checkpoint in {settings.checkpoint_dir} is from before step {limit:,}: the oldest is"
            f" {found[0].tag}; choose one with --from TAG, or fetch a backup (`./launch.sh backup --help`)"
        )
    for generation in found[:1]:
        _check_not_trained(generation, leave_out)


def _check_not_trained(generation: Generation, batches: Sequence[int]) -> None:
    """Check that the checkpoint was not trained on any of ``batches`` of the data.

    Raises:
        UserError: it was: its weights cannot forget them.
    """
    state = generation.manifest.state if generation.manifest is not None else {}
    trained = [batch for batch in batches if batch <= state.get("batch", 0) and batch not in state.get("left_out", ())]
    if trained:
        raise UserError(
            f"--leave_out {format_batches(trained)}: {generation.tag} was trained on this already: resume from an"
            f" earlier checkpoint, such as --from before:{min(trained)}"
        )


def check_initial_model(settings: Settings) -> None:
    """Check the model that a new run is initialized from, if any; a model on the hub is downloaded.

    Raises:
        UserError: there is no such model, its shape differs, or it cannot be downloaded.
    """
    if settings.model.init_from is None:
        return
    from ds_gpt2.pretrained import load  # imports PyTorch, which `train` does not need otherwise

    load.prepare(ModelShape(*settings.model.shape, settings.batch.sequence_length), settings.model.init_from)


_RECORDS = frozenset((METRICS, REPLACED, STARTS, JOURNAL, RECORD, INDEX))
_POINTERS = frozenset((LATEST, LATEST_BACKUP, OWNER))


def check_backup(settings: Settings) -> None:
    """Check the destination of the run's backups without connecting; a directory may be mounted later.

    Raises:
        UserError: no backup can be made there.
    """
    try:
        if (backup := backup_of(settings)) is not None:
            backup.check_named(settings.checkpoint_dir)
    except UserError as error:
        raise UserError(f"checkpoint.backup.to: {error}") from None


def check_new_directories(settings: Settings) -> None:
    """Check that a new run has directories of its own.

    Raises:
        UserError: a new run would overwrite or delete files of something else.
    """
    if not (settings.run_dir / CONFIG).is_file():
        _check_none(settings.run_dir, lambda name: name in _RECORDS or is_shard(name), "run.name")
    if read_owner(settings.checkpoint_dir) is None:
        _check_none(settings.checkpoint_dir, lambda name: name in _POINTERS or role_of(name), "checkpoint.dir")


def _check_none(directory: Path, is_forbidden: Callable[[str], object], setting: str) -> None:
    with contextlib.suppress(OSError):  # whether it can be written to is checked next
        for name in sorted(os.listdir(directory)):
            if is_forbidden(name):
                raise UserError(f"{directory} has {name}, which does not belong to this run: choose another {setting}")


def _check_resume(found: Sequence[Generation], identity: dict[str, Any], steps: int) -> None:
    """Check that the first readable of the checkpoints to resume from fits the run.

    Raises:
        UserError: it does not.
    """
    first = next((one for one in found if one.manifest is not None), None)
    if first is None or first.manifest is None:
        return
    check_identity(first, first.manifest, identity)
    if first.step > steps:
        raise UserError(
            f"{first.tag} is at step {first.step:,}, beyond the {steps:,} steps of the run: increase schedule.steps, or"
            " resume from an older checkpoint with --from STEP"
        )


def _candidates(settings: Settings, source: str) -> list[Generation]:
    """Return the checkpoints to resume from, the first choice first; none if there are only backups.

    Raises:
        UserError: there is neither a checkpoint nor a backup.
    """
    found = candidates(settings.checkpoint_dir, source)
    if not found and not has_backups(settings):
        check_never_saved(settings)
        raise nothing_to_resume(settings.checkpoint_dir)
    return found
