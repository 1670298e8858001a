"""Record which run owns a directory of backups, in ``owner.json`` there, so that a copied run does not use them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_gpt2.checkpoint.backup.storage import Storage
from ds_gpt2.checkpoint.naming import role_of
from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import open_for_writing, read_small
from ds_gpt2.common.locks import try_lock
from ds_gpt2.config.run_address import RunAddress, address_of, read_address
from ds_gpt2.config.run_location import CONFIG, last_seen

OWNER = "owner.json"
_LOCK, _POLL_SECONDS = "backup.lock", 0.2  # the lock is a file in the run's directory

log = logging.getLogger(__name__)


class Ownership:
    """The claim of one run on the directory of its backups."""

    def __init__(self, run_dir: Path | None, location: str) -> None:
        """Read where the run was last started.

        Args:
            run_dir: the directory of the run; None: nothing is checked, recorded or locked.
            location: the address of the backups, for messages.
        """
        self._run_dir = run_dir
        self._location = location
        self._previous_address = _last_address(run_dir) if run_dir is not None else None
        self._is_claimed = False

    def check_directory(self, root: Path) -> None:
        """Check the backups in the local directory ``root``; a directory that cannot be read passes.

        Raises:
            UserError: they belong to another run.
        """
        with contextlib.suppress(OSError):
            names = os.listdir(root)
            content = read_small(root / OWNER) if OWNER in names else None
            self._check_owner(self._owner(content, any(map(role_of, names))))

    def claim(self, storage: Storage) -> None:
        """Record that this run owns the backups in ``storage``.

        Raises:
            UserError: another run owns them, or has taken them over from this run.
            OSError: the storage cannot be read or written.
        """
        if self._run_dir is None:
            return
        content = storage.content("", OWNER)
        owner = self._owner(content, bool(storage.tags()) if content is None else True)
        self._check_owner(owner)
        if content is None or owner is None or not owner.is_of(self._run_dir):
            if owner is not None and not owner.is_of(self._run_dir):
                log.warning(f"{self._location} has the backups of {owner}: this run takes them over")
            storage.make("")
            storage.write("", OWNER, [json.dumps(address_of(self._run_dir).to_dict()).encode()])
        self._is_claimed = True

    @contextlib.contextmanager
    def exclusive(self, on_wait: Callable[[], object]) -> Iterator[None]:
        """Wait until no other process backs up this run: two processes would replace each other's files.

        Args:
            on_wait: called repeatedly while waiting; an exception ends the wait.
        """
        if self._run_dir is None:
            yield
            return
        try:
            file = open_for_writing(self._run_dir / _LOCK, "ab")
        except OSError:  # the directory is not writable: copy without a lock rather than not at all
            yield
            return
        with file:
            while not try_lock(file):
                on_wait()
                time.sleep(_POLL_SECONDS)
            yield

    def _owner(self, content: bytes | None, has_copies: bool) -> RunAddress | None:
        """Return the run that owns the backups; None if unknown.

        Earlier versions wrote no ``owner.json``: then it is the address at which this run was last started, which for
        a copied run is the address of the original.
        """
        if content is None:
            return self._previous_address if has_copies else None
        try:
            return read_address(safe_json.parse(content))
        except ValueError:
            return None

    def _check_owner(self, owner: RunAddress | None) -> None:
        """
        Raises:
            UserError: the owner is another run, which still exists or has taken over from this one.
        """
        if owner is None or self._run_dir is None or owner.is_of(self._run_dir):
            return
        if self._is_claimed or owner.is_in_use():
            raise UserError(
                f"{self._location} has the backups of {owner}: set checkpoint.backup.to to another location"
            )


def _last_address(run_dir: Path) -> RunAddress | None:
    """Return where the run was last started; None if it never was, or if its settings cannot be read."""
    try:
        return address_of(last_seen(run_dir)) if (run_dir / CONFIG).is_file() else None
    except (UserError, OSError):
        return None
