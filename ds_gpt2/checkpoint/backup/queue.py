"""Back up checkpoints in a background thread while training continues."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.backup.schedule import BackupSchedule
from ds_gpt2.checkpoint.backup.storage import redacted_reason
from ds_gpt2.checkpoint.catalog import open_generation, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import COPYING, role_of
from ds_gpt2.common.formatting import duration

_STUCK_SECONDS = 1800.0  # a backup is reported as failed if no block has been sent or read for this time

log = logging.getLogger(__name__)


class StoppedError(OSError):
    """The copy was interrupted on request; the next one continues from there."""


class BackupQueue:
    """Backs up checkpoints in a background thread, on rank 0. Failures are logged and recorded, never raised.

    A checkpoint to copy is first hard-linked into a private directory, so that retention may delete the original.
    """

    def __init__(
        self,
        backup: Backup,
        directory: Callable[[], Path],
        disk: Disk | None = None,
        now: Callable[[], float] = time.time,
        reporter: BackupReporter | None = None,
    ) -> None:
        """Start the thread, which first checks the storage.

        Args:
            directory: returns ``checkpoints/<run>/``, which may be moved during a run. Links that an earlier process
                has left in ``COPYING`` there are deleted.
            now: returns the time in seconds since 1970.
            reporter: records failures and recoveries in the journal.
        """
        self._backup = backup
        self._reporter = reporter
        self._last_progress = time.monotonic()  # when the current copy last sent or read a block
        self._current_directory = directory
        self._disk = disk or Disk()
        self._schedule = BackupSchedule(backup.settings, now)
        self._lock = threading.RLock()  # guards the schedule, the two collections below, and the private directory
        self._jobs: dict[str, Future[None]] = {}  # by tag: the current copy and the waiting ones
        self._failed: set[str] = set()  # tags whose backup failed and was not superseded by a later one
        self._is_schedule_loaded = False
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, "backup")
        self._attempt("clean up after an earlier process", lambda: commit.sweep_copying(self._disk, directory()))
        self._thread.submit(self._check_storage)

    @property
    def _directory(self) -> Path:
        return self._current_directory()

    @property
    def _private(self) -> Path:
        return self._directory / COPYING

    def offer(self, tag: str, roles: Sequence[str], step: int) -> None:
        """Queue the backups that are due after ``tag`` has been committed and saved as ``roles``. Does not block."""
        if self._stop.is_set():
            return
        self._check_stuck()
        with self._lock:
            for due in self._schedule.take(tag, roles, step):
                self._submit(due)

    def offer_last(self, tag: str, step: int) -> None:
        """Queue all outstanding backups at the end of the run, whose last checkpoint is ``tag``."""
        with self._lock:
            for due in self._schedule.take_last(tag, step):
                self._submit(due)

    def finish(self, timeout: float) -> list[str]:
        """Wait at most ``timeout`` seconds for the backups, then stop. Return and log the tags without a backup."""
        with self._lock:
            jobs = list(self._jobs.values())
            waiting = ", ".join(self._jobs)
        if waiting:
            log.info(f"backup: waiting for {waiting}, {duration(timeout)} at most")
        futures.wait(jobs, timeout)
        self._stop.set()  # the current copy ends with its next block
        with self._lock:
            left = sorted({*self._jobs, *self._failed})
            for tag in list(self._jobs):
                self._cancel(tag)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if left:
            log.warning(
                f"backup: {', '.join(left)} not in {self._backup.where()}; `./launch.sh backup` continues the backup"
            )
        return left

    def _submit(self, tag: str) -> None:
        if not self._cancel(tag):  # an older checkpoint of this tag is being copied
            self._schedule.failed(tag)
            return
        if role_of(tag) == "epoch" and not (self._directory / tag).exists():
            log.warning(f"backup: {tag} is not backed up: retention has deleted it meanwhile")
            self._failed.discard(tag)
            return
        if not self._attempt(f"prepare the backup of {tag}", lambda: self._link(tag)):
            self._note_failure(tag)
            return
        if role_of(tag) == "rolling":  # if the storage is too slow for all of them, only the newest is copied
            for older in [queued for queued in self._jobs if role_of(queued) == "rolling"]:
                self._cancel(older)
        self._jobs[tag] = self._thread.submit(self._run, tag)

    def _cancel(self, tag: str) -> bool:
        """Cancel a copy that has not started. Return False if it has started."""
        job = self._jobs.get(tag)
        if job is not None and not job.cancel():
            return False
        if job is not None:
            self._release(tag)
        return True

    def _link(self, tag: str) -> None:
        self._disk.make_directory(self._private)
        commit.link(self._disk, self._directory / tag, self._private, tag)

    def _run(self, tag: str) -> None:
        """Copy ``tag`` and delete old backups. Runs in the thread."""
        try:
            if not self._attempt(f"copy {tag}", lambda: self._copy(tag)):
                self._note_failure(tag)
                return
            step = self._step_of(tag)
            is_pruned = self._attempt("delete old backups", lambda: self._backup.prune(step))
            if is_pruned and self._reporter is not None:
                self._reporter.recovered(f"{tag} is in {self._backup.where(tag)}", step)
        finally:
            with self._lock:
                self._release(tag)

    def _copy(self, tag: str) -> None:
        self._last_progress = time.monotonic()
        self._load_schedule()
        self._backup.check_apart_from(self._directory)
        start_time = time.monotonic()
        sent = self._backup.copy(open_generation(self._private / tag), self._on_progress)
        with self._lock:
            older = {failed for failed in self._failed if role_of(failed) == role_of(tag) == "rolling"}
            self._failed -= {tag, *older}
        log.info(
            f"backup: {tag} is in {self._backup.where(tag)} ({sent:,} bytes, {time.monotonic() - start_time:.1f} s)"
        )

    def _check_storage(self) -> None:
        """Check at the start that the storage is readable and writable, before the first backup. Runs in the thread."""
        if not self._attempt("list the backups", self._load_schedule) or self._reporter is None:
            return
        if self._attempt("write a test file", self._backup.probe):
            self._attempt("claim the location", self._backup.claim)

    def _load_schedule(self) -> None:
        """Read once which backups exist. Runs in the thread, and again if it fails: the storage may be slow or down."""
        if self._is_schedule_loaded:
            return
        copies, local = self._backup.copies(), scan(self._directory)
        with self._lock:
            self._schedule.start_from(copies, local)
        if self._backup.shares_disk_with(self._directory):
            log.warning(
                f"backup: {self._backup.where()} is on the same disk as the checkpoints: a disk failure destroys both"
            )
        self._is_schedule_loaded = True

    def _step_of(self, tag: str) -> int:
        return open_generation(self._private / tag).step

    def _on_progress(self, size: int) -> None:
        if size:  # 0: waiting for another process
            self._last_progress = time.monotonic()
        if self._stop.is_set():
            raise StoppedError("the run has ended")

    def _check_stuck(self) -> None:
        """Report a backup without progress: a mounted file system can hang without an error."""
        silent = time.monotonic() - self._last_progress
        if silent > _STUCK_SECONDS and self._jobs:
            self._report(f"a backup to {self._backup.where()} has made no progress for {duration(silent)}")

    def _note_failure(self, tag: str) -> None:
        with self._lock:
            self._failed.add(tag)
            self._schedule.failed(tag)

    def _release(self, tag: str) -> None:
        self._jobs.pop(tag, None)
        with contextlib.suppress(OSError):  # deleted at the next start
            commit.remove(self._disk, self._private, tag)
            if not any(self._private.iterdir()):
                self._disk.remove_directory(self._private)

    def _attempt(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except StoppedError:
            return False
        except Exception as error:  # of any storage library; no failure of a backup may end the run
            text = f"could not {what}: {redacted_reason(error)}"
            self._report(f"{text} (backups go to {self._backup.where()})")
            log.warning(f"backup: {text}; it is retried after the next checkpoint")
            return False
        return True

    def _report(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.failed(text)
