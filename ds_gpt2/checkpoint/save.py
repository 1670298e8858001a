"""One save on one rank: write its files and its record; on rank 0 commit the checkpoint and run the follow-up work."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import PARTIAL
from ds_gpt2.engine.checkpoint_io import pickle_into
from ds_gpt2.engine.host_copy import HostMemory

log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 1800.0  # how long rank 0 waits for the files of another rank before the save fails
_POLL_SECONDS = 0.01


@dataclass
class Save:
    """A checkpoint being saved. ``run`` does all the work, in any thread, and never raises OSError."""

    disk: Disk
    directory: Path
    tag: str
    rank: int
    world_size: int
    contents: dict[str, Any]  # by file name; they share their tensors with the engine
    memory: HostMemory | None  # the tensors are copied there before they are written; None: they are written directly
    ready: torch.cuda.Event | None  # on a GPU, the event after which the tensors have the values to save
    bytes_per_second: float  # write rate limit; 0 for no limit
    manifest: Callable[[dict[str, FileEntry]], Manifest]
    afterwards: Callable[[str], None]  # called with the tag on rank 0, after the commit
    committed: bool = False
    wrote: bool = False
    copied: threading.Event = field(default_factory=threading.Event)  # from now on the engine may change its tensors
    files_done: threading.Event = field(default_factory=threading.Event)
    aborted: threading.Event = field(default_factory=threading.Event)  # set by the caller if another rank has failed

    @property
    def _partial(self) -> Path:
        return self.directory / (self.tag + PARTIAL)

    def run(self) -> None:
        """Write the files of this rank, and on rank 0 commit. A failure is logged; no partial checkpoint remains."""
        self._write()
        if self.rank == 0:
            self._commit()

    def _write(self) -> None:
        try:
            if self.memory is not None:
                self.contents = self.memory.copy(self.contents, self.ready)
                self.copied.set()
            self.disk.make_directory(self._partial)
            files = {name: self._write_file(name, content) for name, content in self.contents.items()}
            commit.write_record(self.disk, self._partial, self.rank, files)
            self.wrote = True
        except OSError as error:
            log.error(f"rank {self.rank} cannot write its part of checkpoint {self.tag}: {error}")
            self._record_failure(str(error))
        finally:
            self.contents = {}
            self.copied.set()
            self.files_done.set()

    def _write_file(self, name: str, content: Any) -> FileEntry:
        return commit.write_with(self.disk, self._partial / name, self.bytes_per_second, partial(pickle_into, content))

    def _record_failure(self, reason: str) -> None:
        """Delete this rank's files and record the failure, to free space for the record.

        If the record cannot be written either, rank 0 learns of the failure in the next collective.
        """
        for name in self.contents:
            with contextlib.suppress(OSError):
                self.disk.unlink(self._partial / name)
        with contextlib.suppress(OSError):
            commit.write_failure(self.disk, self._partial, self.rank, reason)

    def _commit(self) -> None:
        try:
            files = self._await_all()
            commit.commit(self.disk, self.directory, self.tag, self.manifest(files))
        except OSError as error:
            log.error(
                f"checkpoint {self.tag} was not saved ({error}); training continues, earlier checkpoints are unchanged"
            )
            with contextlib.suppress(OSError):
                commit.discard_failed_commit(self.disk, self.directory, self.tag)
            return
        self.committed = True
        self.afterwards(self.tag)

    def _await_all(self) -> dict[str, FileEntry]:
        """Return the files of all ranks.

        After a failure it still waits for the other ranks: the files they are writing are deleted afterwards.
        """
        files: dict[str, FileEntry] = {}
        failure: OSError | None = None
        for rank in range(self.world_size):
            try:
                files |= self._await(rank)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return files

    def _await(self, rank: int) -> dict[str, FileEntry]:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while (files := commit.read_record(self._partial, rank)) is None:
            if self.aborted.is_set() or time.monotonic() > deadline or not self._partial.exists():
                raise OSError(f"rank {rank} has not written its files")
            time.sleep(_POLL_SECONDS)
        return files
