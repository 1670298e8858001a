"""Backups: copies of checkpoints in another storage, safe from a failure of the disk of the originals.

A backup has its own files, not hard links. The backup of a checkpoint is in ``<url>/<run>/<tag>/``, with the same files
as ``checkpoints/<run>/<tag>/``. Object stores cannot rename, so the manifest is the commit marker there too: it is
written last and deleted first. Only one process at a time may write the backups of a run; see ``ownership``.

The pointer ``latest_backup`` and ``--resume backup`` are something else: the checkpoint before the newest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ds_gpt2.checkpoint import commit, retention
from ds_gpt2.checkpoint.backup.ownership import Ownership
from ds_gpt2.checkpoint.backup.storage import (
    BLOCK,
    LocalStorage,
    Storage,
    check_protocol,
    file_instead_of,
    local_directory,
    open_storage,
    redact,
)
from ds_gpt2.checkpoint.catalog import Generation, open_generation, problem_of, tags_of
from ds_gpt2.checkpoint.filesystem import Disk, HashingFile
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest, decode, encode, size_problem_of
from ds_gpt2.checkpoint.manifest import problem_of as file_problem_of
from ds_gpt2.checkpoint.naming import MANIFEST, PARTIAL, Role, is_plain_name, role_of
from ds_gpt2.checkpoint.retention import RetentionCandidate
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only
from ds_gpt2.config.settings import BackupSettings

log = logging.getLogger(__name__)

Progress = Callable[[int], object]  # called with the number of bytes done since the last call


@dataclass(frozen=True)
class Copy:
    """A committed backup of one checkpoint; its files are not verified."""

    tag: str
    role: Role
    manifest: Manifest


class Backup:
    """The backups of one run in one storage.

    Methods raise OSError if the storage or the local disk fails.
    """

    def __init__(
        self,
        url: str,
        run_name: str,
        settings: BackupSettings,
        disk: Disk | None = None,
        run_dir: Path | None = None,
    ) -> None:
        """Check the URL; no connection is opened.

        Args:
            url: a local directory, or a URL that fsspec supports.
            run_dir: the directory of the run, which must own the backups; None: ownership is not checked.

        Raises:
            UserError: the protocol of the URL is not supported.
        """
        check_protocol(url)
        assert is_plain_name(run_name)
        self.settings = settings
        self._url = url
        self._run_name = run_name
        self._disk = disk or Disk()
        self._run_dir = run_dir
        self._ownership = Ownership(run_dir, self.where())

    def where(self, tag: str = "") -> str:
        """Return the address of the backup ``tag``, or of the directory of all backups, without secrets."""
        return redact("/".join(part for part in (self._url.rstrip("/"), self._run_name, tag) if part))

    def check_named(self, checkpoints: Path) -> None:
        """Check a local location by its path, without creating or connecting to anything; a missing directory passes.

        Args:
            checkpoints: the directory of the run's checkpoints.

        Raises:
            UserError: a file is in the way, the location is within ``checkpoints`` or the run's directory, or it has
                the backups of another run.
        """
        directory = local_directory(self._url)
        if directory is None:
            return
        root = directory / self._run_name
        if (file := file_instead_of(root)) is not None:
            raise UserError(f"cannot back up to {redact(self._url)}: {file} is not a directory: give a directory")
        if root.resolve().is_relative_to(checkpoints.resolve()):
            raise self._checkpoint_directory_error()
        if self._run_dir is not None and root.resolve().is_relative_to(self._run_dir.resolve()):
            raise UserError(f"{self.where()} is in the run's directory: give another location for backups")
        self._ownership.check_directory(root)

    def check_exists(self) -> None:
        """Check that a local directory exists.

        Raises:
            UserError: it does not exist, or a file is in the way.
        """
        if not isinstance(self._storage, LocalStorage):
            return
        if (file := file_instead_of(self._storage.root)) is not None:
            raise UserError(f"cannot back up to {redact(self._url)}: {file} is not a directory: give a directory")
        if not self._storage.exists():
            raise UserError(f"the backup directory {redact(self._url)} does not exist: create it, or mount its disk")

    def check_apart_from(self, checkpoints: Path) -> None:
        """Check that the backups are not in the directory of the checkpoints.

        Raises:
            UserError: they are: a checkpoint would be mistaken for its own backup.
        """
        if isinstance(self._storage, LocalStorage) and self._storage.root.resolve() == checkpoints.resolve():
            raise self._checkpoint_directory_error()

    def _checkpoint_directory_error(self) -> UserError:
        return UserError(f"{self.where()} overlaps the directory of the checkpoints: give another location for backups")

    def probe(self) -> None:
        """Write, read and delete a small file in the storage; nothing remains.

        Raises:
            OSError: one of these operations fails.
        """
        self._storage.probe()

    def claim(self) -> None:
        """Record that this run owns the backups.

        Raises:
            UserError: another run owns them, or has taken them over from this run.
        """
        self._ownership.claim(self._storage)

    def shares_disk_with(self, checkpoints: Path) -> bool:
        """Return whether the backups are on the same disk as ``checkpoints``: a disk failure would destroy both."""
        storage = self._storage
        return isinstance(storage, LocalStorage) and os.stat(storage.root.parent).st_dev == os.stat(checkpoints).st_dev

    def copy(self, generation: Generation, progress: Progress = lambda _: None) -> int:
        """Copy ``generation`` to the storage and return the number of bytes sent. Intact files are not sent again.

        Args:
            progress: called with the size of each block that is sent or read back, and with 0 while waiting for
                another process; an exception ends the copy.

        Raises:
            UserError: the directory does not have the name of a checkpoint, or another run owns the backups.
            DamagedError: the checkpoint is damaged, or one of its files is missing or unreadable. Files of an
                uncommitted backup of it are deleted.
            OSError: the storage cannot be written, or it returns other data than written.
        """
        if generation.role is None:
            raise UserError(f"{generation.path} does not have the name of a checkpoint")
        if generation.manifest is None:
            raise DamagedError(generation.problem)
        with self._ownership.exclusive(on_wait=lambda: progress(0)):
            try:
                return self._copy(generation, generation.manifest, progress)
            except DamagedError:
                self._remove_uncommitted(generation.tag)
                raise

    def _copy(self, generation: Generation, manifest: Manifest, progress: Progress) -> int:
        self.claim()
        tag, files, marker = generation.tag, manifest.files, encode(manifest)
        missing = [name for name, entry in files.items() if not self._has(tag, name, entry, progress)]
        progress(sum(entry.bytes for name, entry in files.items() if name not in missing))  # as if they had been sent
        if not missing and self._storage.content(tag, MANIFEST) == marker:
            return 0
        is_replaced = self._storage.content(tag, MANIFEST) is not None  # only by an intact checkpoint
        problem_in = file_problem_of if is_replaced else size_problem_of
        for name in missing:  # before anything is sent or replaced
            if (problem := problem_in(generation.path, name, files[name])) is not None:
                raise DamagedError(problem)
        self._storage.make(tag)
        self._clear(tag, files.keys() - set(missing))
        for name in missing:
            self._send(generation, name, files[name], progress)
        self._commit(tag, marker)
        return sum(files[name].bytes for name in missing)

    def copies(self) -> list[Copy]:
        """Return the committed backups, the last created first: after a rollback that is not the highest step."""
        found = [copy for tag in self._storage.tags() if (copy := self._copy_of(tag)) is not None]
        return sorted(found, key=lambda copy: (copy.manifest.made_at, copy.manifest.step, copy.tag), reverse=True)

    def prune(self, step: int) -> list[str]:
        """Delete the backups of rolling checkpoints except the newest ``keep``, and older incomplete ones.

        Backups of later steps than ``step`` are neither deleted nor counted: the run was rolled back, or restarted
        under the same name, and only the user can decide which history to retain.

        Returns:
            The tags of the deleted backups.
        """
        steps = {copy.tag: copy.manifest.step for copy in self.copies() if copy.role == "rolling"}
        found = [RetentionCandidate(tag, "rolling", at, verified=False) for tag, at in steps.items() if at <= step]
        deleted = [copy.tag for copy in retention.to_delete(found, [retention.keep_last(self.settings.keep)])]
        oldest = min((at for tag, at in steps.items() if tag not in deleted), default=0)
        deleted += [tag for tag in self._storage.tags() if tag not in steps and 0 <= _rolling_step(tag) < oldest]
        for tag in deleted:
            self._storage.remove(tag)
        return deleted

    def fetch(self, tag: str, directory: Path, progress: Progress = lambda _: None) -> Generation:
        """Restore the backup ``tag`` as a checkpoint in ``directory``, that is ``checkpoints/<run>/``.

        A checkpoint of this tag is left unchanged if it equals the backup, and replaced if it is damaged. A different
        checkpoint of this tag is superseded, as by any commit.

        Raises:
            UserError: there is no such backup.
            DamagedError: the backup is damaged; ``directory`` is unchanged.
        """
        copy = self._copy_of(tag)
        if copy is None:
            raise self._missing(tag)
        local = open_generation(directory / tag)
        if local.manifest == copy.manifest and problem_of(local) is None:
            return local
        self._download(copy, directory / (tag + PARTIAL), progress)
        if local.manifest in (None, copy.manifest):
            commit.remove(self._disk, directory, tag)
        commit.commit(self._disk, directory, tag, copy.manifest)
        return open_generation(directory / tag)

    def find(self, selector: str) -> Copy:
        """Return the backup that ``selector`` denotes: a tag, a step, ``best``, or an epoch, as for a resume.

        Raises:
            UserError: there is no such backup.
        """
        for tag in tags_of(selector):
            if (copy := self._copy_of(tag)) is not None:
                return copy
        same_step = [copy for copy in self.copies() if str(copy.manifest.step) == selector]
        if not same_step:
            raise self._missing(selector)
        return same_step[0]

    def _missing(self, name: str) -> UserError:
        available = ", ".join(copy.tag for copy in self.copies()) or "none"
        return UserError(f"no backup {name} in {self.where()}; available: {available}")

    @functools.cached_property
    def _storage(self) -> Storage:
        return open_storage(self._url, self._run_name, self._disk)

    def _has(self, tag: str, name: str, entry: FileEntry, progress: Progress) -> bool:
        """Return whether the storage has the file, intact."""
        if self._storage.size(tag, name) != entry.bytes:
            return False
        digest = hashlib.sha256()
        self._storage.read(tag, name, _each(digest.update, progress))
        return digest.hexdigest() == entry.sha256

    def _clear(self, tag: str, intact: set[str]) -> None:
        """Delete all files of the backup except the intact ones, its manifest first."""
        names = self._storage.names(tag)
        if MANIFEST in names:
            self._storage.remove_file(tag, MANIFEST)
            self._storage.sync(tag)
        for name in set(names) - intact - {MANIFEST}:
            self._storage.remove_file(tag, name)

    def _remove_uncommitted(self, tag: str) -> None:
        """Delete the files of a backup without a manifest: its source is damaged, so that it cannot be completed."""
        with contextlib.suppress(OSError):
            if self._storage.names(tag) and self._storage.content(tag, MANIFEST) is None:
                self._storage.remove(tag)

    def _send(self, generation: Generation, name: str, entry: FileEntry, progress: Progress) -> None:
        digest = hashlib.sha256()
        self._storage.write(generation.tag, name, _blocks_of(generation.path, name, _each(digest.update, progress)))
        if digest.hexdigest() != entry.sha256:
            raise DamagedError(f"{name} is damaged: sha256 mismatch")
        if not self._has(generation.tag, name, entry, progress):
            raise OSError(f"{self.where(generation.tag)}/{name} does not read back as it was written")

    def _commit(self, tag: str, marker: bytes) -> None:
        self._storage.sync(tag)
        self._storage.write(tag, MANIFEST, [marker])
        self._storage.sync(tag)
        if self._storage.content(tag, MANIFEST) != marker:
            raise OSError(f"{self.where(tag)}/{MANIFEST} does not read back as it was written")

    def _copy_of(self, tag: str) -> Copy | None:
        role = role_of(tag)
        marker = self._storage.content(tag, MANIFEST) if role else None
        if role is None or marker is None:
            return None
        try:
            return Copy(tag, role, decode(marker))
        except DamagedError as error:
            log.warning(f"{self.where(tag)} is not a valid backup: {error}")
            return None

    def _download(self, copy: Copy, partial: Path, progress: Progress) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        commit.discard(self._disk, partial)
        self._disk.make_directory(partial)
        try:
            for name, entry in copy.manifest.files.items():
                fill = functools.partial(self._receive, copy.tag, name, progress)
                if commit.write_with(self._disk, partial / name, 0.0, fill) != entry:
                    raise DamagedError(f"{self.where(copy.tag)}/{name} is damaged: size or sha256 mismatch")
        except BaseException:
            with contextlib.suppress(OSError):
                commit.discard(self._disk, partial)
            raise

    def _receive(self, tag: str, name: str, progress: Progress, file: HashingFile) -> None:
        try:
            self._storage.read(tag, name, _each(file.write, progress))
        except FileNotFoundError:
            raise DamagedError(f"{self.where(tag)}/{name} is missing") from None


def _rolling_step(tag: str) -> int:
    """Return the step in the tag of a rolling checkpoint; -1 for another tag."""
    return int(tag.rsplit("_", 1)[1]) if role_of(tag) == "rolling" else -1


def _blocks_of(checkpoint: Path, name: str, on_block: Callable[[bytes], object]) -> Iterator[bytes]:
    """Yield the blocks of file ``name`` of a checkpoint.

    Raises:
        DamagedError: the file is missing or unreadable. An OSError would be mistaken for one of the storage.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(open(checkpoint / name, "rb", opener=regular_only))
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
        while block := _next_block(file, name):
            on_block(block)
            yield block


def _next_block(file: BinaryIO, name: str) -> bytes:
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from None


def _each(on_block: Callable[[bytes], object], progress: Progress) -> Callable[[bytes], None]:
    """Return a function that passes a block to ``on_block`` and its size to ``progress``."""

    def both(block: bytes) -> None:
        on_block(block)
        progress(len(block))

    return both
