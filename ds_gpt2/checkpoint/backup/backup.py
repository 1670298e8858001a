"""A second home for checkpoints: real copies in another place.

A hard link shares its blocks and dies with them; a copy does not. The copies of a run lie in ``<place>/<run>/<tag>/``,
the same files as in ``checkpoints/<run>/<tag>/``. Object stores cannot rename, so the manifest is the commit marker
there too: written last, removed first. One process at a time may write the copies of a run, and ``owner.json`` beside
them names the run that does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint import commit, retention
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
from ds_gpt2.checkpoint.catalog import Generation, open_generation, problem_of
from ds_gpt2.checkpoint.filesystem import Disk, HashingFile
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest, decode, encode
from ds_gpt2.checkpoint.naming import MANIFEST, PARTIAL, Role, is_plain_name, role_of
from ds_gpt2.checkpoint.retention import RetentionCandidate
from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import open_for_writing, read_small, regular_only, try_lock
from ds_gpt2.config.run_address import RunAddress, address_of, read_address
from ds_gpt2.config.run_location import CONFIG, last_seen
from ds_gpt2.config.settings import BackupSettings

OWNER = "owner.json"
_LOCK, _LOOK_SECONDS = "backup.lock", 0.2  # in the run's directory

log = logging.getLogger(__name__)

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Copy:
    """A committed copy at the place; its files are not verified."""

    tag: str
    role: Role
    manifest: Manifest


class Backup:
    """The copies of one run in one place.

    Unless said otherwise, methods raise OSError where the place or the disk does not do what it is asked.
    """

    def __init__(
        self,
        place: str,
        run_name: str,
        settings: BackupSettings,
        disk: Disk | None = None,
        run_dir: Path | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            run_dir: of the run, which no other may share the location with; None does not check.

        Raises:
            UserError: nothing here can reach a place of that kind.
        """
        check_protocol(place)
        assert is_plain_name(run_name)
        self.settings = settings
        self._url = place
        self._run_name = run_name
        self._disk = disk or Disk()
        self._run_dir = run_dir
        self._before = _last_address(run_dir) if run_dir is not None else None
        self._is_claimed = False

    def where(self, tag: str = "") -> str:
        """The address of a copy, or of all of them, as it may be shown."""
        return redact("/".join(part for part in (self._url.rstrip("/"), self._run_name, tag) if part))

    def check_named(self, checkpoints: Path) -> None:
        """Check the location by its name, without connecting to anything; a directory that is missing passes.

        Args:
            checkpoints: the directory of the run's checkpoints.

        Raises:
            UserError: a file is in the way, the location is within ``checkpoints``, or another run's copies are there.
        """
        directory = local_directory(self._url)
        if directory is None:
            return
        root = directory / self._run_name
        if (file := file_instead_of(root)) is not None:
            raise UserError(f"cannot copy to {redact(self._url)}: {file} is not a directory: give a directory")
        if root.resolve().is_relative_to(checkpoints.resolve()):
            raise UserError(f"{self.where()} is where the checkpoints themselves are: give another place for copies")
        if self._run_dir is not None and root.resolve().is_relative_to(self._run_dir.resolve()):
            raise UserError(f"{self.where()} is in the run's directory: give another place for copies")
        with contextlib.suppress(OSError):
            names = os.listdir(root)
            content = read_small(root / OWNER) if OWNER in names else None
            self._check_owner(self._owner_by(content, any(map(role_of, names))))

    def check_exists(self) -> None:
        """
        Raises:
            UserError: the place is a directory that is not there, or a file is in the way.
        """
        if isinstance(self._place, LocalStorage) and (file := file_instead_of(self._place.root)) is not None:
            raise UserError(f"cannot copy to {redact(self._url)}: {file} is not a directory: give a directory")
        if isinstance(self._place, LocalStorage) and not self._place.is_there():
            raise UserError(f"no directory {redact(self._url)} to copy to: make it, or mount what belongs there")

    def check_apart_from(self, checkpoints: Path) -> None:
        """
        Raises:
            UserError: the place is where the run's checkpoints are: one would be taken for a copy of itself.
        """
        if isinstance(self._place, LocalStorage) and self._place.root.resolve() == checkpoints.resolve():
            raise UserError(f"{self.where()} is where the checkpoints themselves are: give another place for copies")

    def probe(self) -> None:
        """Write, read and delete a small file there; nothing is left behind.

        Raises:
            OSError: one of these does not work.
        """
        self._place.probe()

    def claim(self) -> None:
        """Record that this run writes here.

        Raises:
            UserError: another run does, or has taken over from this one.
        """
        if self._run_dir is None:
            return
        content = self._place.content("", OWNER)
        owner = self._owner_by(content, bool(self._place.tags()) if content is None else True)
        self._check_owner(owner)
        if content is None or owner is None or not owner.is_of(self._run_dir):
            if owner is not None and not owner.is_of(self._run_dir):
                log.warning(f"{self.where()} has the copies of {owner}: this run takes them over")
            self._place.make("")
            self._place.write("", OWNER, [json.dumps(address_of(self._run_dir).to_dict()).encode()])
        self._is_claimed = True

    def shares_disk_with(self, checkpoints: Path) -> bool:
        """Whether what destroys that disk destroys both."""
        place = self._place
        return isinstance(place, LocalStorage) and os.stat(place.root.parent).st_dev == os.stat(checkpoints).st_dev

    def copy(self, generation: Generation, progress: Progress = lambda _: None) -> int:
        """Make the place hold ``generation``; files that are there and good are not sent again. Returns bytes sent.

        Args:
            progress: told the size of each block that is sent or read back; what it raises ends the copy.

        Raises:
            UserError: it is a directory that a person has named, or another run's copies are there.
            DamagedError: it is not what was written, and does not count as copied.
            OSError: it cannot be read, or the place cannot be written, or gives back something else.
        """
        if generation.role is None:
            raise UserError(f"{generation.path} has not the name of a checkpoint")
        if generation.manifest is None:
            raise DamagedError(generation.problem)
        with self._alone(progress):
            return self._copy(generation, generation.manifest, progress)

    def _copy(self, generation: Generation, known: Manifest, progress: Progress) -> int:
        self.claim()
        tag, files, marker = generation.tag, known.files, encode(known)
        missing = [name for name, entry in files.items() if not self._has(tag, name, entry, progress)]
        progress(sum(entry.bytes for name, entry in files.items() if name not in missing))  # as if they had been sent
        if not missing and self._place.content(tag, MANIFEST) == marker:
            return 0
        self._place.make(tag)
        self._clear(tag, files.keys() - set(missing))
        for name in missing:
            self._send(generation, name, files[name], progress)
        self._commit(tag, marker)
        return sum(files[name].bytes for name in missing)

    @contextlib.contextmanager
    def _alone(self, progress: Progress) -> Iterator[None]:
        """Wait while another process copies this run: two copies at once would replace each other's files."""
        if self._run_dir is None:
            yield
            return
        try:
            file = open_for_writing(self._run_dir / _LOCK, "ab")
        except OSError:  # a directory that cannot be written: a copy is worth more than the lock
            yield
            return
        with file:
            while not try_lock(file):
                progress(0)
                time.sleep(_LOOK_SECONDS)
            yield

    def copies(self) -> list[Copy]:
        """The copies there, what was made last first: after a run has gone back, that is not the highest step."""
        found = [copy for tag in self._place.tags() if (copy := self._copy_of(tag)) is not None]
        return sorted(found, key=lambda copy: (copy.manifest.made_at, copy.manifest.step, copy.tag), reverse=True)

    def prune(self, step: int) -> list[str]:
        """Delete the copies of rolling checkpoints but the newest ``keep``, and unfinished older ones. Returns tags.

        Those of later steps than ``step`` are left alone and not counted: the run has gone back, or begun anew under
        its old name, and only a person knows which history is worth more.
        """
        steps = {copy.tag: copy.manifest.step for copy in self.copies() if copy.role == "rolling"}
        found = [RetentionCandidate(tag, "rolling", at, verified=False) for tag, at in steps.items() if at <= step]
        doomed = [kept.tag for kept in retention.to_delete(found, [retention.keep_last(self.settings.keep)])]
        oldest = min((at for tag, at in steps.items() if tag not in doomed), default=0)
        doomed += [tag for tag in self._place.tags() if tag not in steps and 0 <= _rolling_step(tag) < oldest]
        for tag in doomed:
            self._place.remove(tag)
        return doomed

    def fetch(self, tag: str, directory: Path, progress: Progress = lambda _: None) -> Generation:
        """Bring the copy ``tag`` back as a checkpoint in ``directory``, that is ``checkpoints/<run>/``.

        One of that name is left alone if it is the same, replaced if it is damaged, and gives way as it does to any
        commit if it is another.

        Raises:
            UserError: there is no such copy.
            DamagedError: the copy is not what was written; ``directory`` is as before.
        """
        copy = self._copy_of(tag)
        if copy is None:
            raise UserError(f"no copy {tag} in {self.where()}: there are {', '.join(self._tags_held()) or 'none'}")
        here = open_generation(directory / tag)
        if here.manifest == copy.manifest and problem_of(here) is None:
            return here
        self._download(copy, directory / (tag + PARTIAL), progress)
        if here.manifest in (None, copy.manifest):
            commit.remove(self._disk, directory, tag)
        commit.commit(self._disk, directory, tag, copy.manifest)
        return open_generation(directory / tag)

    def _owner_by(self, content: bytes | None, has_copies: bool) -> RunAddress | None:
        """Which run the copies are of: earlier versions recorded none, and a copied run tells where it was."""
        if content is None:
            return self._before if has_copies else None
        try:
            return read_address(safe_json.parse(content))
        except ValueError:
            return None

    def _check_owner(self, owner: RunAddress | None) -> None:
        """
        Raises:
            UserError: it is another run than this one, which still exists or has taken over.
        """
        if owner is None or self._run_dir is None or owner.is_of(self._run_dir):
            return
        if self._is_claimed or owner.is_in_use():
            raise UserError(f"{self.where()} has the copies of {owner}: set checkpoint.backup.to to another location")

    @functools.cached_property
    def _place(self) -> Storage:
        return open_storage(self._url, self._run_name, self._disk)

    def _has(self, tag: str, name: str, entry: FileEntry, progress: Progress) -> bool:
        if self._place.size(tag, name) != entry.bytes:
            return False
        digest = hashlib.sha256()
        self._place.read(tag, name, _each(digest.update, progress))
        return digest.hexdigest() == entry.sha256

    def _clear(self, tag: str, good: set[str]) -> None:
        """Whatever else is there under this name ceases to be a copy, then ceases to be."""
        names = self._place.names(tag)
        if MANIFEST in names:
            self._place.remove_file(tag, MANIFEST)
            self._place.sync(tag)
        for name in set(names) - good - {MANIFEST}:
            self._place.remove_file(tag, name)

    def _send(self, generation: Generation, name: str, entry: FileEntry, progress: Progress) -> None:
        digest = hashlib.sha256()
        self._place.write(generation.tag, name, _blocks_of(generation.path / name, _each(digest.update, progress)))
        if digest.hexdigest() != entry.sha256:
            raise DamagedError(f"{name} is damaged: its sha256 is not the one written")
        if not self._has(generation.tag, name, entry, progress):
            raise OSError(f"{self.where(generation.tag)}/{name} does not read back as it was written")

    def _commit(self, tag: str, marker: bytes) -> None:
        self._place.sync(tag)
        self._place.write(tag, MANIFEST, [marker])
        self._place.sync(tag)
        if self._place.content(tag, MANIFEST) != marker:
            raise OSError(f"{self.where(tag)}/{MANIFEST} does not read back as it was written")

    def _copy_of(self, tag: str) -> Copy | None:
        role = role_of(tag)
        marker = self._place.content(tag, MANIFEST) if role else None
        if role is None or marker is None:
            return None
        try:
            return Copy(tag, role, decode(marker))
        except DamagedError as error:
            log.warning(f"{self.where(tag)} does not count as a copy: {error}")
            return None

    def _tags_held(self) -> list[str]:
        return [copy.tag for copy in self.copies()]

    def _download(self, copy: Copy, partial: Path, progress: Progress) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        commit.discard(self._disk, partial)
        self._disk.make_directory(partial)
        try:
            for name, entry in copy.manifest.files.items():
                fill = functools.partial(self._pour, copy.tag, name, progress)
                if commit.write_with(self._disk, partial / name, 0.0, fill) != entry:
                    raise DamagedError(f"{self.where(copy.tag)}/{name} is not what was written")
        except BaseException:
            with contextlib.suppress(OSError):
                commit.discard(self._disk, partial)
            raise

    def _pour(self, tag: str, name: str, progress: Progress, file: HashingFile) -> None:
        self._place.read(tag, name, _each(file.write, progress))


def _last_address(run_dir: Path) -> RunAddress | None:
    """Where the run was when it was last started; None if it never was, or its settings cannot be read."""
    try:
        return address_of(last_seen(run_dir)) if (run_dir / CONFIG).is_file() else None
    except (UserError, OSError):
        return None


def _rolling_step(tag: str) -> int:
    """The step in the name of a rolling checkpoint; -1 of another."""
    return int(tag.rsplit("_", 1)[1]) if role_of(tag) == "rolling" else -1


def _blocks_of(path: Path, take: Callable[[bytes], object]) -> Iterator[bytes]:
    with open(path, "rb", opener=regular_only) as file:
        while block := file.read(BLOCK):
            take(block)
            yield block


def _each(take: Callable[[bytes], object], progress: Progress) -> Callable[[bytes], None]:
    """Give each block to ``take`` and its size to ``progress``."""

    def both(block: bytes) -> None:
        take(block)
        progress(len(block))

    return both
