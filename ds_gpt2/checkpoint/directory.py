"""Maintain ``checkpoints/<run>/`` on rank 0: pointers, roles, deletion of old checkpoints, free space.

Failures are logged and retried after the next commit; they never end a run.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_gpt2.checkpoint import commit, retention
from ds_gpt2.checkpoint.catalog import Generation, history, open_generation, scan
from ds_gpt2.checkpoint.commit import read_pointer
from ds_gpt2.checkpoint.filesystem import Disk, write_file
from ds_gpt2.checkpoint.naming import BEST_TAG, LATEST, MANIFEST, PARTIAL, role_of, rolling_tag
from ds_gpt2.checkpoint.retention import Policy, RetentionCandidate
from ds_gpt2.checkpoint.space import bytes_for_next_save, newest_full_bytes
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted, size
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.output_owner import OWNER
from ds_gpt2.config.settings import CheckpointSettings
from ds_gpt2.engine.train_state import TrainState

log = logging.getLogger(__name__)

RECOVERY_SCRIPT = "zero_to_fp32.py"


class CheckpointDirectory:
    """The directory ``checkpoints/<run>/``. Remembers which checkpoints this process has committed or verified."""

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        settings: CheckpointSettings,
        on_recreated: Callable[[str], object] = log.error,
    ) -> None:
        """Open the directory, if it exists.

        Args:
            on_recreated: called with a message if the directory was deleted during the run and has been recreated.
        """
        self._open = OpenDirectory(directory)
        self._on_recreated = on_recreated
        self.settings = settings
        self.disk = disk
        self._verified: set[str] = set()

    @property
    def directory(self) -> Path:
        """The current path: the directory may be moved during a run."""
        return self._open.path

    def start(self) -> None:
        """Complete or delete what a crash has left unfinished. Call it before the checkpoints are read."""
        self._attempt("clean up", commit.sweep, self.disk, self.directory)
        self._attempt("repair latest", self._repair_pointer)
        self._attempt("create the epoch checkpoints", self._create_epochs)
        self._attempt("update the best checkpoint", self._update_best)
        self._attempt(f"provide {RECOVERY_SCRIPT}", self._provide_recovery_script)

    def check_free_space(self, estimate: int) -> None:
        """Check that a new run has enough free space for its first checkpoint.

        Args:
            estimate: the size of a checkpoint in bytes.

        Raises:
            UserError: there is no checkpoint yet, and not enough free space for one.
        """
        needed = bytes_for_next_save(estimate, self.settings)
        free = self.disk.free_bytes(self.directory)
        if free < needed and not scan(self.directory):
            raise UserError(
                f"{self.directory} has {size(free)} free; a checkpoint takes {size(estimate)} and"
                f" {self.settings.min_free_gb:g} GB must remain free (checkpoint.min_free_gb): free some space, or set"
                " checkpoint.dir to another disk"
            )

    def resume_from(self, generation: Generation) -> None:
        """Make ``generation`` the newest checkpoint of the run's history: newer ones are superseded.

        Raises:
            OSError: this cannot be recorded on disk. Training must not continue: the run would have two histories.
        """
        directory = self.directory
        tag = self._import(generation)
        for newer in reversed(history(directory)):  # oldest first: a crash in between leaves no gap in the history
            if newer.step > generation.step:
                log.info(
                    f"{newer.tag} is newer than the checkpoint to resume from: superseded; it is deleted when the run"
                    f" has {counted(self.settings.keep_last, 'rolling checkpoint')} (checkpoint.keep_last)"
                )
                commit.supersede(self.disk, directory, newer.tag)
        self._attempt("update the best checkpoint", self._update_best)
        self._verified.add(tag)
        if read_pointer(directory, LATEST) != tag:  # the history does not depend on it; a full disk may prevent it
            self._attempt("update latest", commit.point_to, self.disk, directory, tag)

    def _import(self, generation: Generation) -> str:
        """Return the tag of ``generation`` in the run's history. It is linked or copied here if it is not there yet."""
        directory, rolling = self.directory, rolling_tag(generation.step)
        if generation.role in ("rolling", "epoch") and generation.path.parent.resolve() == directory.resolve():
            return generation.tag
        if (directory / rolling).exists() and (directory / rolling / MANIFEST).samefile(generation.path / MANIFEST):
            return rolling
        log.info(f"importing {generation.path} as {rolling}")
        commit.link(self.disk, generation.path, directory, rolling)
        return rolling

    def after_commit(self, tag: str, roles: Sequence[str]) -> None:
        """Update pointers and roles for ``tag``, which has just been committed, and delete old checkpoints."""
        self._verified.add(tag)
        self._attempt("update latest", commit.point_to, self.disk, self.directory, tag)
        for role in roles:
            if role != BEST_TAG:
                self._attempt(f"save {tag} as {role}", self._save_as, tag, role)
        self._attempt("update the best checkpoint", self._update_best)
        self._attempt("delete old checkpoints", self._prune)

    def prepare_for(self, tag: str, estimate: int) -> bool:
        """Prepare the directory for the checkpoint ``tag`` and return whether it can be written.

        The remains of an earlier attempt are deleted. If the free space is too small, older checkpoints are deleted.
        If the checkpoint cannot be written, the reason is logged as an error.

        Args:
            estimate: the size of a checkpoint in bytes, used if there is no earlier one.
        """
        try:
            if self._open.is_replaced(OWNER, LATEST):
                reason = "another directory is there now: mount the disk again"
                raise FileNotFoundError(errno.ENOENT, reason, str(self.directory))
            if self._open.is_deleted:
                self._open.recreate()
                self._attempt(f"provide {RECOVERY_SCRIPT}", self._provide_recovery_script)
                self._on_recreated(f"{self.directory} was deleted while the run trained: it is recreated for {tag}")
            # The records in it would be mistaken for those of this save.
            commit.remove(self.disk, self.directory, tag + PARTIAL)
            return self._free_space(estimate)
        except OSError as error:
            log.error(f"no checkpoint was saved: {error}")
            return False

    def _free_space(self, estimate: int) -> bool:
        """Delete old checkpoints until the next one fits; return whether it does."""
        needed = bytes_for_next_save(newest_full_bytes(self.directory) or estimate, self.settings)
        if self.disk.free_bytes(self.directory) >= needed:
            return True
        for candidate in retention.deletion_order(self._candidates()):
            log.warning(f"the disk is nearly full: deleting {candidate.tag} to free space for the next checkpoint")
            self._attempt(f"delete {candidate.tag}", commit.remove, self.disk, self.directory, candidate.tag)
            if self.disk.free_bytes(self.directory) >= needed:
                return True
        free = self.disk.free_bytes(self.directory)
        log.error(
            f"no checkpoint was saved: it needs {size(needed)}, {self.directory} has {size(free)} free;"
            " free some space on its disk"
        )
        return False

    def _save_as(self, tag: str, role: str) -> None:
        """Create the checkpoint ``role`` from ``tag``: the same files, or only its weights if the settings say so."""
        kind = self.settings.best_as if role == BEST_TAG else self.settings.epochs_as
        if kind == "weights":
            from ds_gpt2.checkpoint.weights import save_weights  # imported here only: it needs torch

            save_weights(self.disk, self.directory / tag, self.directory, role)
        else:
            commit.link(self.disk, self.directory / tag, self.directory, role)
            self._verified.add(role)

    def _repair_pointer(self) -> None:
        """Make ``latest`` name the newest checkpoint: a crash may have occurred before the pointer was updated."""
        resumable = [found for found in scan(self.directory) if found.is_resumable]
        if resumable and resumable[0].tag != read_pointer(self.directory, LATEST):
            commit.point_to(self.disk, self.directory, resumable[0].tag)

    def _update_best(self) -> None:
        """Make ``best_model`` the checkpoint with the lowest validation loss, also after a crash prevented this."""
        if not self.settings.keep_best:
            return
        current = open_generation(self.directory / BEST_TAG).manifest
        current_loss = current.val_loss if current is not None else None
        measured = [
            (found.manifest.val_loss, found.tag)
            for found in scan(self.directory)
            if found.is_primary and found.manifest is not None and found.manifest.val_loss is not None
        ]
        if measured and (current_loss is None or min(measured)[0] < current_loss):
            self._save_as(min(measured)[1], BEST_TAG)

    def _create_epochs(self) -> None:
        """Create the missing epoch checkpoints from rolling ones: a crash may have prevented this after the commit."""
        for found in scan(self.directory):
            for role in found.manifest.roles if found.manifest is not None and found.role == "rolling" else ():
                if role_of(role) == "epoch" and not (self.directory / role / MANIFEST).exists():
                    self._save_as(found.tag, role)

    def _prune(self) -> None:
        for candidate in retention.to_delete(self._candidates(), policies(self.settings)):
            if candidate.role == "superseded":
                log.info(f"deleting {candidate.tag}: superseded, and checkpoint.keep_last is {self.settings.keep_last}")
            self._attempt(f"delete {candidate.tag}", commit.remove, self.disk, self.directory, candidate.tag)

    def _candidates(self) -> list[RetentionCandidate]:
        return retention_candidates(self.directory, self._verified)

    def _provide_recovery_script(self) -> None:
        """Copy DeepSpeed's script that extracts fp32 weights next to the checkpoints, as DeepSpeed does."""
        from ds_gpt2.engine.checkpoint_io import recovery_script  # imports DeepSpeed

        content, target = recovery_script(), self.directory / RECOVERY_SCRIPT
        if not target.exists() or target.read_bytes() != content:
            unfinished = target.with_name(target.name + PARTIAL)
            write_file(self.disk, unfinished, content)
            self.disk.rename(unfinished, target)

    def _attempt(self, what: str, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception as error:  # no failure here may end the run
            log.warning(f"could not {what}: {error!r}; it is retried after the next checkpoint")


def policies(settings: CheckpointSettings) -> list[Policy]:
    """Return the retention policies of ``settings``."""
    epochs = None if settings.keep_epochs == "all" else settings.keep_epochs
    return [
        retention.keep_last(settings.keep_last),
        retention.keep_every(settings.keep_every),
        retention.keep_epochs(epochs),
        retention.keep_best,
    ]


def retention_candidates(directory: Path, verified: set[str]) -> list[RetentionCandidate]:
    """Return the checkpoints in ``directory`` for the retention policies.

    Args:
        verified: the tags of verified checkpoints.
    """
    return [
        RetentionCandidate(found.tag, found.role, found.step, found.tag in verified, _is_healthy(found))
        for found in scan(directory)
        if found.role
    ]


def _is_healthy(generation: Generation) -> bool:
    try:
        return generation.manifest is not None and TrainState.from_dict(generation.manifest.state).is_healthy
    except TypeError:  # not a TrainState of this project
        return False
