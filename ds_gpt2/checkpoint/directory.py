"""What happens around commits, on rank 0: pointers, roles, old checkpoints, room on the disk.

A failure here is logged and tried again at the next commit; it never ends a run.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_gpt2.checkpoint import commit, retention
from ds_gpt2.checkpoint.catalog import Generation, open_generation, scan
from ds_gpt2.checkpoint.commit import read_pointer
from ds_gpt2.checkpoint.filesystem import Disk, write_file
from ds_gpt2.checkpoint.naming import BEST_TAG, LATEST, MANIFEST, PARTIAL, role_of, rolling_tag
from ds_gpt2.checkpoint.retention import Policy, RetentionCandidate
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.run_location import OWNER
from ds_gpt2.config.settings import CheckpointSettings
from ds_gpt2.engine.train_state import TrainState

log = logging.getLogger(__name__)

RECOVERY_SCRIPT = "zero_to_fp32.py"


class CheckpointDirectory:
    """Keeps ``checkpoints/<run>/`` in order. Knows which checkpoints are good: those it saw committed or verified."""

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        settings: CheckpointSettings,
        made_again: Callable[[str], object] = log.error,
    ) -> None:
        """
        Args:
            made_again: called with one line when the directory was deleted during the run and has been made again.
        """
        self._open = OpenDirectory(directory)
        self._made_again = made_again
        self.settings = settings
        self.disk = disk
        self._verified: set[str] = set()

    @property
    def directory(self) -> Path:
        """Where the checkpoints are now: they may be moved during a run."""
        return self._open.path

    def start(self) -> None:
        """Before anything is looked for here: what a crash has left half-done is finished or removed."""
        self._attempt("clean up", commit.sweep, self.disk, self.directory)
        self._attempt("repair latest", self._repair_pointer)
        self._attempt("keep the ends of epochs", self._keep_epochs)
        self._attempt("keep the best checkpoint", self._keep_best)
        self._attempt(f"provide {RECOVERY_SCRIPT}", self._provide_recovery_script)

    def check_free_space(self, estimate: int) -> None:
        """
        Args:
            estimate: bytes of a checkpoint.

        Raises:
            UserError: a run that has no checkpoint yet could not even keep one.
        """
        needed = estimate + int(self.settings.min_free_gb * 1e9)
        free = self.disk.free_bytes(self.directory)
        if free < needed and not scan(self.directory):
            raise UserError(
                f"{self.directory} has {free / 1e9:.2f} GB free; a checkpoint takes {estimate / 1e9:.2f} GB and"
                f" {self.settings.min_free_gb:g} GB are to stay free: make room, or set checkpoint.dir"
            )

    def resume_from(self, generation: Generation) -> None:
        """``generation`` is what the run goes on from: whatever is newer is no longer part of its history.

        Raises:
            OSError: that could not be written down; going on would leave two histories.
        """
        directory = self.directory
        tag = self._part_of_history(generation)
        for newer in reversed(scan(directory)):  # a crash in between leaves the newest, not one in the middle
            if not newer.is_superseded and newer.step > generation.step:
                log.info(f"{newer.tag} is newer than what the run goes on from: superseded")
                commit.supersede(self.disk, directory, newer.tag)
        self._attempt("keep the best checkpoint", self._keep_best)
        self._verified.add(tag)
        if read_pointer(directory, LATEST) != tag:
            commit.point_to(self.disk, directory, tag)

    def _part_of_history(self, generation: Generation) -> str:
        """The tag under which ``generation`` is one of the run's own; taken in from wherever it is, if need be."""
        directory, rolling = self.directory, rolling_tag(generation.step)
        if generation.role in ("rolling", "epoch") and generation.path.parent.resolve() == directory.resolve():
            return generation.tag
        if (directory / rolling).exists() and (directory / rolling / MANIFEST).samefile(generation.path / MANIFEST):
            return rolling
        log.info(f"taking {generation.path} in as {rolling}")
        commit.link(self.disk, generation.path, directory, rolling)
        return rolling

    def after_commit(self, tag: str, roles: Sequence[str]) -> None:
        """``tag`` has just been committed: point to it, give it its roles, delete what no policy keeps."""
        self._verified.add(tag)
        self._attempt("move latest", commit.point_to, self.disk, self.directory, tag)
        for role in roles:
            if role != BEST_TAG:
                self._attempt(f"keep {tag} as {role}", self._keep_as, tag, role)
        self._attempt("keep the best checkpoint", self._keep_best)
        self._attempt("delete old checkpoints", self._prune)

    def prepare_for(self, tag: str, estimate: int) -> bool:
        """Whether ``tag`` can be written: nothing of an earlier attempt is left, and it fits on the disk.

        Older ones give way if need be, so that the free space asked for stays. False is said, loudly.

        Args:
            estimate: bytes, used where no checkpoint shows how large one is.
        """
        try:
            if self._open.is_replaced(OWNER, LATEST):
                reason = "another directory is there now: mount the disk again"
                raise FileNotFoundError(errno.ENOENT, reason, str(self.directory))
            if self._open.is_deleted:
                self._open.make_again()
                self._attempt(f"provide {RECOVERY_SCRIPT}", self._provide_recovery_script)
                self._made_again(f"{self.directory} was deleted while the run trained: it is made again for {tag}")
            commit.remove(self.disk, self.directory, tag + PARTIAL)  # a record in it would be taken for a new one
            return self._make_room(estimate)
        except OSError as error:
            log.error(f"NO CHECKPOINT IS SAVED: {error}")
            return False

    def _make_room(self, estimate: int) -> bool:
        sizes = [found.manifest.bytes for found in scan(self.directory) if found.manifest and not found.weights_only]
        needed = (sizes[0] if sizes else estimate) + int(self.settings.min_free_gb * 1e9)
        if self.disk.free_bytes(self.directory) >= needed:
            return True
        for kept in retention.deletion_order(self._known()):
            log.warning(f"the disk is nearly full: deleting {kept.tag} to make room for the next checkpoint")
            self._attempt(f"delete {kept.tag}", commit.remove, self.disk, self.directory, kept.tag)
            if self.disk.free_bytes(self.directory) >= needed:
                return True
        free = self.disk.free_bytes(self.directory)
        log.error(
            f"NO CHECKPOINT IS SAVED: it needs {needed / 1e9:.2f} GB, {self.directory} has {free / 1e9:.2f} GB free;"
            " make room"
        )
        return False

    def _keep_as(self, tag: str, role: str) -> None:
        kept_as = self.settings.best_as if role == BEST_TAG else self.settings.epochs_as
        if kept_as == "weights":
            from ds_gpt2.checkpoint.weights import keep_weights  # only here: it needs torch

            keep_weights(self.disk, self.directory / tag, self.directory, role)
        else:
            commit.link(self.disk, self.directory / tag, self.directory, role)
            self._verified.add(role)

    def _repair_pointer(self) -> None:
        """A crash may come between a commit, or superseding what ``latest`` names, and moving the pointer."""
        history = [found for found in scan(self.directory) if found.is_resumable]
        if history and history[0].tag != read_pointer(self.directory, LATEST):
            commit.point_to(self.disk, self.directory, history[0].tag)

    def _keep_best(self) -> None:
        """Of all there are, the best by validation loss is ``best_model``; also after a crash before it could be."""
        if not self.settings.keep_best:
            return
        present = open_generation(self.directory / BEST_TAG).manifest
        beaten = present.val_loss if present is not None else None
        measured = [
            (found.manifest.val_loss, found.tag)
            for found in scan(self.directory)
            if found.role in ("rolling", "epoch") and not found.weights_only
            if found.manifest is not None and found.manifest.val_loss is not None
        ]
        if measured and (beaten is None or min(measured)[0] < beaten):
            self._keep_as(min(measured)[1], BEST_TAG)

    def _keep_epochs(self) -> None:
        """What was committed as the end of an epoch is kept as such; also after a crash before it could be."""
        for found in scan(self.directory):
            for role in found.manifest.roles if found.manifest is not None and found.role == "rolling" else ():
                if role_of(role) == "epoch" and not (self.directory / role / MANIFEST).exists():
                    self._keep_as(found.tag, role)

    def _prune(self) -> None:
        for kept in retention.to_delete(self._known(), policies(self.settings)):
            self._attempt(f"delete {kept.tag}", commit.remove, self.disk, self.directory, kept.tag)

    def _known(self) -> list[RetentionCandidate]:
        return known(self.directory, self._verified)

    def _provide_recovery_script(self) -> None:
        from deepspeed.utils import zero_to_fp32

        content, target = Path(zero_to_fp32.__file__).read_bytes(), self.directory / RECOVERY_SCRIPT
        if not target.exists() or target.read_bytes() != content:
            unfinished = target.with_name(target.name + PARTIAL)
            write_file(self.disk, unfinished, content)
            self.disk.rename(unfinished, target)

    def _attempt(self, what: str, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception as error:  # whatever it is, the run is worth more
            log.warning(f"could not {what}: {error!r}; it is tried again after the next checkpoint")


def policies(settings: CheckpointSettings) -> list[Policy]:
    """What the settings say is to be kept."""
    epochs = None if settings.keep_epochs == "all" else settings.keep_epochs
    return [
        retention.keep_last(settings.keep_last),
        retention.keep_every(settings.keep_every),
        retention.keep_epochs(epochs),
        retention.keep_best,
    ]


def known(directory: Path, verified: set[str]) -> list[RetentionCandidate]:
    """The checkpoints of ``directory`` as retention sees them."""
    return [
        RetentionCandidate(found.tag, found.role, found.step, found.tag in verified, _is_healthy(found))
        for found in scan(directory)
        if found.role
    ]


def _is_healthy(generation: Generation) -> bool:
    try:
        return generation.manifest is not None and TrainState.from_dict(generation.manifest.state).is_healthy
    except TypeError:  # not a state of ours
        return False
