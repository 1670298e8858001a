"""Decide which checkpoints are due for a backup."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from ds_gpt2.checkpoint.backup.backup import Copy
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.naming import BEST_TAG, Role, role_of
from ds_gpt2.common.formatting import HOUR
from ds_gpt2.config.settings import BackupSettings

# The names in ``checkpoint.backup.roles``, by the role of the checkpoint. Checkpoints of other roles are not backed up.
_SELECTED_BY: dict[Role | None, Literal["latest", "epoch", "best"]] = {
    "rolling": "latest",
    "epoch": "epoch",
    "best": "best",
}


class BackupSchedule:
    """Decides which checkpoints are due for a backup, by ``checkpoint.backup`` of the settings."""

    def __init__(self, settings: BackupSettings, now: Callable[[], float] = time.time) -> None:
        """Start without any backups, see ``start_from``.

        Args:
            now: returns the time in seconds since 1970, the clock of the manifests.
        """
        self._settings = settings
        self._now = now
        self._newest_step: int | None = None  # of the newest rolling checkpoint that is backed up or being copied
        self._best_time: float | None = None  # of the newest backup of best_model, in seconds since 1970
        self._best_is_pending = False
        self._pending_epochs: set[str] = set()  # tags of epoch checkpoints without a backup

    def start_from(self, copies: Sequence[Copy], local: Sequence[Generation]) -> None:
        """Take over from an earlier process.

        Args:
            copies: the committed backups in the storage.
            local: the checkpoints of the run.
        """
        copied = {copy.tag: copy.manifest for copy in copies}
        differing = {found.tag for found in local if found.manifest and copied.get(found.tag) != found.manifest}
        self._pending_epochs |= {tag for tag in differing if self._is_selected_epoch(tag)}
        if self._newest_step is None:
            reached = max((found.step for found in local), default=-1)
            rolling = [copy.manifest.step for copy in copies if copy.role == "rolling" and copy.manifest.is_evaluated]
            self._newest_step = max((step for step in rolling if step <= reached), default=None)
        if self._best_time is None:
            self._best_time = copied[BEST_TAG].made_at if BEST_TAG in copied else None
            self._best_is_pending |= BEST_TAG in differing

    def due(self, tag: str, roles: Sequence[str], step: int) -> list[str]:
        """Return the tags to back up after ``tag``, of ``step``, has been committed and also saved as ``roles``."""
        due = sorted(self._pending_epochs.union(role for role in roles if self._is_selected_epoch(role)))
        if self._best_is_due(BEST_TAG in roles):
            due.append(BEST_TAG)
        if self._is_selected(tag) and self._is_far_enough(step):
            due.append(tag)
        return due

    def take(self, tag: str, roles: Sequence[str], step: int) -> list[str]:
        """Return ``due``. These tags count as copied from now on, until ``failed`` is called."""
        due = self.due(tag, roles, step)
        self._pending_epochs -= set(due)
        if tag in due:
            self._newest_step = step
        self._best_is_pending |= BEST_TAG in roles
        if BEST_TAG in due:
            self._best_is_pending, self._best_time = False, self._now()
        return due

    def take_last(self, tag: str, step: int) -> list[str]:
        """Return the tags to back up at the end of the run, regardless of the intervals in the settings."""
        due = sorted(self._pending_epochs)
        if self._best_is_pending and self._is_selected(BEST_TAG):
            due.append(BEST_TAG)
        if self._is_selected(tag) and self._newest_step != step:
            due.append(tag)
        self._pending_epochs, self._best_is_pending, self._newest_step = set(), False, step
        return due

    def failed(self, tag: str) -> None:
        """Record that ``tag`` was not copied. It is due again; for a rolling checkpoint, the next one is due."""
        if role_of(tag) == "epoch":
            self._pending_epochs.add(tag)
        elif tag == BEST_TAG:
            self._best_is_pending, self._best_time = True, None
        else:
            self._newest_step = None

    def _is_selected(self, tag: str) -> bool:
        """Return whether the settings select checkpoints with the role of ``tag``."""
        return _SELECTED_BY.get(role_of(tag)) in self._settings.roles

    def _is_selected_epoch(self, tag: str) -> bool:
        return role_of(tag) == "epoch" and self._is_selected(tag)

    def _best_is_due(self, is_new: bool) -> bool:
        if not self._is_selected(BEST_TAG) or not (is_new or self._best_is_pending):
            return False
        return self._best_time is None or self._now() - self._best_time >= self._settings.best_every_hours * HOUR

    def _is_far_enough(self, step: int) -> bool:
        newest = self._newest_step
        return newest is None or step < newest or step - newest >= self._settings.every
