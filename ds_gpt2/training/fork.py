"""Fork a run: begin a new run with the full state of a checkpoint of another run, the parent.

The new run has its own directories. The parent's checkpoint is linked (where links are not possible: copied) into them,
so that neither run depends on the files of the other. The order of the writes is: settings, ``fork.json``, the
checkpoint, ``latest``. The new run exists once its checkpoint is committed; before that, a repeated command completes
it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import Generation, candidates, identity_differences, scan, step_limit, tags_of
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest, read
from ds_gpt2.checkpoint.naming import LATEST_BACKUP, LOCK, MANIFEST, PARTIAL, rolling_tag
from ds_gpt2.checkpoint.output_check import check_outputs
from ds_gpt2.checkpoint.space import bytes_for_next_save
from ds_gpt2.checkpoint.verify import hashing, identity
from ds_gpt2.common import locks
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import nearest_existing, sync_directory
from ds_gpt2.common.formatting import size
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.lookup import find_run
from ds_gpt2.config.output_owner import write_owner
from ds_gpt2.config.run_location import load_run_settings, run_argument, write_settings
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir import supervisor_record
from ds_gpt2.run_dir.file_checks import check_files
from ds_gpt2.run_dir.fork_record import Ancestor, Fork, read_fork, write_fork
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.run_dir.starts import STARTS, TIME, read_starts
from ds_gpt2.training.preflight import check_backup, check_can_write, check_data, check_new_directories
from ds_gpt2.training.run_identity import identity_of

_SEVERAL = ("latest", "auto", "backup", LATEST_BACKUP)  # selectors with an older checkpoint to fall back to


@dataclass(frozen=True)
class Parent:
    """The run to fork."""

    run_dir: Path
    checkpoint_dir: Path
    selector: str  # of its checkpoint, see ``catalog.candidates``
    has_backups: bool = False  # by its settings; they are not used here

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def hint(self) -> str:
        """How the run gets a usable checkpoint if it has none; empty if it has no backups."""
        fetch = f"; fetch a backup first: `./launch.sh backup {run_argument(self.run_dir)} --fetch TAG`"
        return fetch if self.has_backups else ""

    @property
    def falls_back(self) -> bool:
        """Whether an older checkpoint is used in place of a damaged one."""
        return self.selector in _SEVERAL or step_limit(self.selector) is not None


@dataclass(frozen=True)
class PlannedFork:
    """A fork that can be made: everything is checked, and nothing is written yet."""

    settings: Settings  # of the new run
    record: Fork
    source: Path  # the parent's checkpoint
    manifest: Manifest  # of the checkpoint in ``source`` when it was verified
    is_copied: bool  # its files cannot be linked


def find_parent(text: str, settings: Settings) -> Parent:
    """Return the run and the selector in ``text``, RUN or RUN:TAG.

    Both RUN, if it is a path, and TAG (``before:STEP``) may contain colons: the longest RUN that exists is meant.

    Args:
        settings: of the new run.

    Raises:
        UserError: there is no such run, or the new run is not apart from it.
    """
    run_dir, selector = _split(text)
    theirs = load_run_settings(run_dir)
    parent = Parent(run_dir, theirs.checkpoint_dir, selector, theirs.checkpoint.backup.to is not None)
    if settings.run.name == parent.name:
        raise UserError(f"--fork {text}: the new run has the name of its parent, {parent.name}: add run.name=NEW")
    for directory in settings.output_dirs:
        for other in (parent.run_dir, parent.checkpoint_dir):
            if directory.resolve().is_relative_to(other.resolve()):
                raise UserError(
                    f"--fork {text}: the new run would write to {directory}, in a directory of run {parent.name}: set"
                    " checkpoint.dir and monitor.dir to directories outside of it"
                )
    return parent


def _split(text: str) -> tuple[Path, str]:
    """Return the directory of the run and the selector in ``text``.

    Raises:
        UserError: there is no such run.
    """
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        name, selector = ":".join(parts[:count]), ":".join(parts[count:])
        if not name or (count < len(parts) and not selector):
            raise UserError(f"--fork {text!r}: must be RUN or RUN:TAG, such as base or base:60000")
        if count == 1:
            return find_run(name), selector or "latest"
        with contextlib.suppress(UserError):
            return find_run(name), selector or "latest"
    raise AssertionError


def is_begun(settings: Settings, text: str) -> bool:
    """Return whether the new run is a complete fork of the run in ``text``: ``--auto`` then resumes it.

    The parent may have been deleted since: its name is compared.

    Raises:
        UserError: the new run is a fork of another run, or its record cannot be read.
    """
    fork = read_fork(settings.run_dir)
    if fork is None or not (scan(settings.checkpoint_dir) or read_starts(settings.run_dir)):
        return False
    parts = text.split(":")
    splits = [(Path(":".join(parts[:count])).name, ":".join(parts[count:])) for count in range(1, len(parts) + 1)]
    if not any(name == fork.run and _may_denote(selector, fork) for name, selector in splits):
        raise UserError(
            f"run {settings.run.name} is a fork of {fork}, not of {text}: choose another run.name, or resume it with"
            f" `./launch.sh resume {run_argument(settings.run_dir)}`"
        )
    return True


def _may_denote(selector: str, fork: Fork) -> bool:
    """Return whether ``selector`` may have chosen the checkpoint of ``fork``; the parent may be gone."""
    if not selector or selector in _SEVERAL or step_limit(selector) is not None:
        return True
    return fork.tag in tags_of(selector) or selector == str(fork.step)


def is_complete(settings: Settings, parent: Parent) -> bool:
    """Return whether an interrupted command has made this fork already, and no rank has started since.

    Raises:
        UserError: it was made from another checkpoint than the one that is requested now.
    """
    fork = read_fork(settings.run_dir)
    found = scan(settings.checkpoint_dir)
    if fork is None or read_starts(settings.run_dir) or [one.tag for one in found] != [rolling_tag(fork.step)]:
        return False
    is_same = fork.run == parent.name and (parent.falls_back or fork.step == _candidates(parent)[0].step)
    if not is_same:
        raise UserError(
            f"run {settings.run.name} is a fork of {fork} already, not started yet: start it with `./launch.sh resume"
            f" {run_argument(settings.run_dir)}`, or choose another run.name"
        )
    return True


def plan_fork(settings: Settings, plan: BatchPlan, parent: Parent) -> PlannedFork:
    """Choose and verify the parent's checkpoint, and check that the new run can begin with it. Writes nothing.

    A damaged checkpoint is reported on stderr and the next older one is used, unless it was named.

    Raises:
        UserError: the new run exists already, no checkpoint is usable, or it does not fit the settings.
    """
    check_outputs(settings)
    check_files(settings.run_dir)
    check_backup(settings)
    _check_new(settings)
    for generation in _candidates(parent):
        if generation.manifest is not None:
            _check_fits(settings, plan, parent, generation, generation.manifest)
        with hashing([generation]) as hashes:
            problem = generation.problem or hashes.problem_of(generation)
        if problem is None and generation.manifest is not None:
            is_copied = _must_copy(generation.path, settings.checkpoint_dir)
            _check_free_space(settings, generation.manifest.bytes, is_copied)
            check_can_write(settings)
            record = _record_of(parent, generation)
            return PlannedFork(settings, record, generation.path, generation.manifest, is_copied)
        if not parent.falls_back:
            raise UserError(
                f"cannot fork {parent.name}: checkpoint {generation.path} cannot be used: {problem}; choose another:"
                f" `./launch.sh list {run_argument(parent.run_dir)}`"
            )
        print(f"warning: checkpoint {generation.path} cannot be used: {problem}", file=sys.stderr)
    raise UserError(
        f"cannot fork {parent.name}: no checkpoint in {parent.checkpoint_dir} can be used (see above){parent.hint}"
    )


def create(planned: PlannedFork, disk: Disk | None = None) -> None:
    """Create the new run with the parent's checkpoint, durably; print what was done.

    Args:
        disk: for the checkpoint; default: the real file system.

    Raises:
        UserError: another process creates or trains this run, or a file cannot be written.
    """
    settings, record = planned.settings, planned.record
    directory, name = settings.checkpoint_dir, settings.run.name
    supervisor_dir = settings.run_dir / supervisor_record.SUPERVISOR_DIR
    try:
        for each in (supervisor_dir, directory):
            each.mkdir(parents=True, exist_ok=True)
            sync_directory(each.parent)
        with (
            locks.lock(supervisor_dir / supervisor_record.LOCK, f"run {name}"),
            locks.lock(directory / LOCK, f"run {name}"),
        ):
            _check_new(settings)
            write_settings(settings)
            write_fork(settings.run_dir, record)
            if directory in settings.shared_output_dirs:
                write_owner(directory, settings.run_dir)
            _link(planned, disk or Disk())
    except (DamagedError, OSError) as error:
        if (change := _change_of(planned)) is not None:
            raise UserError(
                f"cannot fork {record}: {planned.source} was {change} meanwhile: repeat the command"
            ) from None
        where = getattr(error, "filename", None) or planned.source
        raise UserError(f"cannot fork {record}: {where}: {reason_of(error)}; fix it and repeat the command") from None
    print(f"run {name}: forked from {record.lineage} ({record.tag})", flush=True)


def _link(planned: PlannedFork, disk: Disk) -> None:
    directory, tag = planned.settings.checkpoint_dir, rolling_tag(planned.record.step)
    if planned.is_copied:
        print(f"copying {planned.source} to {directory}: its files cannot be linked there ...", flush=True)
    try:
        commit.link(disk, planned.source, directory, tag, planned.manifest)
    except BaseException:
        with contextlib.suppress(OSError):
            commit.discard(disk, directory / (tag + PARTIAL))
        raise
    commit.point_to(disk, directory, tag)


def _change_of(planned: PlannedFork) -> str | None:
    """Return what the parent, which may be training, has done to its checkpoint since the plan; None if nothing."""
    if identity(planned.source) is None:
        return "deleted"
    try:
        return None if commit.has_same_files(read(planned.source), planned.manifest) else "replaced"
    except DamagedError:
        return None


def _check_new(settings: Settings) -> None:
    """Check that the new run has neither checkpoints nor a history.

    Raises:
        UserError: it has, or its directories have files of something else.
    """
    run_dir, name = settings.run_dir, settings.run.name
    found = [one.path for one in scan(settings.checkpoint_dir)]
    found += [run_dir / file for file in (STARTS, METRICS, JOURNAL) if (run_dir / file).exists()]
    if found:
        fork = read_fork(run_dir)
        what = f"is a fork of {fork} already" if fork is not None else "exists already"
        raise UserError(
            f"run {name} {what} ({found[0]}): resume it with `./launch.sh resume {run_argument(run_dir)}`, or choose"
            " another run.name for the fork"
        )
    check_new_directories(settings)


def _candidates(parent: Parent) -> list[Generation]:
    """Return the parent's checkpoints to try, the first choice first; at least one.

    Raises:
        UserError: there is none, or the one that is named is not a full checkpoint of this run.
    """
    found, limit = candidates(parent.checkpoint_dir, parent.selector), step_limit(parent.selector)
    if limit is not None:
        found = [one for one in found if one.step < limit]
    if not found:
        before = "" if limit is None else f" before step {limit:,}"
        raise UserError(
            f"cannot fork {parent.name}: it has no full checkpoint{before} in {parent.checkpoint_dir}{parent.hint}"
        )
    first = found[0]
    if first.path.parent.resolve() != parent.checkpoint_dir.resolve():
        raise UserError(f"cannot fork {parent.name}: {first.path} is not one of its checkpoints: give RUN:TAG")
    if first.weights_only:
        command = f"./launch.sh export {run_argument(parent.run_dir)} --tag {first.tag}"
        raise UserError(
            f"cannot fork {parent.name} from {first.tag}: it has only weights, no optimizer state; to begin a new run"
            f" with them: `{command}`, then train with model.init_from=EXPORTED"
        )
    return found


def _check_fits(
    settings: Settings, plan: BatchPlan, parent: Parent, generation: Generation, manifest: Manifest
) -> None:
    """Check that the new run can begin with the checkpoint, as a resume does.

    Raises:
        UserError: its settings do not fit.
    """
    what = f"cannot fork {parent.name} from {generation.tag}"
    data, steps = check_data(settings, plan, [generation])
    if differing := identity_differences(manifest, identity_of(settings, data)):
        raise UserError(
            f"{what}: it was made with {', '.join(differing)}: a fork needs the same; to use only the weights in"
            " another run, export them and set model.init_from"
        )
    if generation.step >= steps:
        where = "the last step" if generation.step == steps else f"beyond the {steps:,} steps"
        raise UserError(
            f"{what}: step {generation.step:,} is {where} of run {settings.run.name}: increase schedule.steps, or fork"
            f" from an earlier step with --fork {run_argument(parent.run_dir)}:STEP"
        )


def _check_free_space(settings: Settings, needs: int, is_copied: bool) -> None:
    """Check that the disk has enough free space for the first save, and for the copy if one is needed.

    Args:
        needs: bytes of a checkpoint.

    Raises:
        UserError: it has not.
    """
    directory, copied = settings.checkpoint_dir, needs if is_copied else 0
    free = Disk().free_bytes(nearest_existing(directory))
    if free < bytes_for_next_save(needs, settings.checkpoint) + copied:
        twice = " twice (the copy and the first save)" if copied else ""
        raise UserError(
            f"{directory} has {size(free)} free; a checkpoint takes {size(needs)}{twice} and"
            f" {settings.checkpoint.min_free_gb:g} GB must remain free (checkpoint.min_free_gb): free some space, or"
            " set checkpoint.dir to another disk"
        )


def _must_copy(checkpoint: Path, directory: Path) -> bool:
    """Return whether the files of ``checkpoint`` cannot be linked to ``directory``; tries it with the manifest.

    It is on another file system, this one has no links, or the files are another user's.
    """
    probe = nearest_existing(directory) / f".probe-{os.getpid()}"
    try:
        os.link(checkpoint / MANIFEST, probe)
    except OSError as error:  # other errors are reported where the checkpoint is linked
        return error.errno in commit.NO_HARD_LINKS
    probe.unlink()
    return False


def _record_of(parent: Parent, generation: Generation) -> Fork:
    before = read_fork(parent.run_dir)
    ancestors = () if before is None else (Ancestor(before.run, before.step), *before.ancestors)
    return Fork(parent.name, str(parent.run_dir), generation.tag, generation.step, time.strftime(TIME), ancestors)
