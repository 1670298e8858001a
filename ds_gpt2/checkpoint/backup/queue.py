"""Backups while training goes on: what is due for a copy, and a thread that makes it."""

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
from ds_gpt2.checkpoint.backup.backup import Backup, Copy
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.backup.storage import reason_of
from ds_gpt2.checkpoint.catalog import Generation, open_generation, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import BEST_TAG, COPYING, role_of
from ds_gpt2.common.formatting import duration
from ds_gpt2.config.settings import BackupSettings

_STUCK_SECONDS = 1800.0  # a copy of which no block has been sent or read for so long counts as failed

log = logging.getLogger(__name__)


class StoppedError(OSError):
    """A copy was ended on request; another one goes on from there."""


class BackupSchedule:
    """What is due for a copy. ``now`` tells seconds since 1970, as the manifests do."""

    def __init__(self, settings: BackupSettings, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        self._newest_step: int | None = None  # of the rolling one that was copied last, or is about to be
        self._best_at: float | None = None
        self._best_waits = False
        self._owed: set[str] = set()  # ends of epochs that are not there yet

    def start_from(self, held: Sequence[Copy], local: Sequence[Generation]) -> None:
        """Take over from the process before: what the place holds, and what should be there and is not."""
        there = {copy.tag: copy.manifest for copy in held}
        differing = {found.tag for found in local if found.manifest and there.get(found.tag) != found.manifest}
        self._owed |= {tag for tag in differing if role_of(tag) == "epoch" and "epoch" in self._settings.roles}
        if self._newest_step is None:
            reached = max((found.step for found in local), default=-1)
            rolling = [copy.manifest.step for copy in held if copy.role == "rolling" and copy.manifest.is_evaluated]
            self._newest_step = max((step for step in rolling if step <= reached), default=None)
        if self._best_at is None:
            self._best_at = there[BEST_TAG].made_at if BEST_TAG in there else None
            self._best_waits |= BEST_TAG in differing

    def due(self, tag: str, roles: Sequence[str], step: int) -> list[str]:
        """The tags to copy now that ``tag``, of ``step``, has been committed and is known by ``roles`` too."""
        due = sorted(self._owed.union(role for role in roles if self._is_wanted_epoch(role)))
        if self._best_is_due(BEST_TAG in roles):
            due.append(BEST_TAG)
        if "latest" in self._settings.roles and self._is_far_enough(step):
            due.append(tag)
        return due

    def take(self, tag: str, roles: Sequence[str], step: int) -> list[str]:
        """``due``, all of which counts as copied from now on, until ``failed`` says otherwise."""
        due = self.due(tag, roles, step)
        self._owed -= set(due)
        if tag in due:
            self._newest_step = step
        self._best_waits |= BEST_TAG in roles
        if BEST_TAG in due:
            self._best_waits, self._best_at = False, self._now()
        return due

    def take_last(self, tag: str, step: int) -> list[str]:
        """``take`` at the end of the run, when there will be no other occasion."""
        due = sorted(self._owed)
        if self._best_waits and "best" in self._settings.roles:
            due.append(BEST_TAG)
        if "latest" in self._settings.roles and self._newest_step != step:
            due.append(tag)
        self._owed, self._best_waits, self._newest_step = set(), False, step
        return due

    def failed(self, tag: str) -> None:
        """``tag`` was not copied: it, or for a rolling one what follows it, is due at the next occasion."""
        if role_of(tag) == "epoch":
            self._owed.add(tag)
        elif tag == BEST_TAG:
            self._best_waits, self._best_at = True, None
        else:
            self._newest_step = None

    def _is_wanted_epoch(self, role: str) -> bool:
        return role_of(role) == "epoch" and "epoch" in self._settings.roles

    def _best_is_due(self, is_new: bool) -> bool:
        if "best" not in self._settings.roles or not (is_new or self._best_waits):
            return False
        return self._best_at is None or self._now() - self._best_at >= self._settings.best_every_hours * 3600

    def _is_far_enough(self, step: int) -> bool:
        newest = self._newest_step
        return newest is None or step < newest or step - newest >= self._settings.every


class BackupQueue:
    """Copies checkpoints while training goes on, on rank 0. Nothing that goes wrong here is raised.

    What is due is hard-linked into a directory of its own first, so that retention may delete the original meanwhile.
    """

    def __init__(
        self,
        backup: Backup,
        directory: Callable[[], Path],
        disk: Disk | None = None,
        now: Callable[[], float] = time.time,
        reporter: BackupReporter | None = None,
    ) -> None:
        """
        Args:
            directory: returns ``checkpoints/<run>/``, which may be moved during a run; what an earlier process left in
                ``COPYING`` there is removed.
            reporter: records failures and recoveries in the journal.
        """
        self._backup = backup
        self._reporter = reporter
        self._moved = time.monotonic()  # when the copy under way last sent or read a block
        self._where = directory
        self._disk = disk or Disk()
        self._cadence = BackupSchedule(backup.settings, now)
        self._lock = threading.RLock()  # around the cadence, the two collections below, and the private directory
        self._under_way: dict[str, Future[None]] = {}  # waiting ones too
        self._lacking: set[str] = set()  # failed, and not made up for since
        self._has_looked = False
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, "backup")
        self._attempt("clean up after an earlier one", lambda: commit.sweep_copying(self._disk, directory()))
        self._thread.submit(self._try_out)

    @property
    def _directory(self) -> Path:
        return self._where()

    @property
    def _private(self) -> Path:
        return self._directory / COPYING

    def due(self, tag: str, roles: Sequence[str], step: int) -> list[str]:
        """See ``BackupSchedule.due``."""
        with self._lock:
            return self._cadence.due(tag, roles, step)

    def offer(self, tag: str, roles: Sequence[str], step: int) -> None:
        """``tag`` has just been committed and is known by ``roles`` too: have copied what is due. Returns at once."""
        if self._stop.is_set():
            return
        self._check_stuck()
        with self._lock:
            for due in self._cadence.take(tag, roles, step):
                self._submit(due)

    def offer_last(self, tag: str, step: int) -> None:
        """``tag`` is what the run has come to: have copied whatever is wanted and not there."""
        with self._lock:
            for due in self._cadence.take_last(tag, step):
                self._submit(due)

    def finish(self, timeout: float) -> list[str]:
        """The end of the run: wait at most ``timeout`` seconds. Returns, and says, what has not been copied."""
        with self._lock:
            under_way = list(self._under_way.values())
            waiting = ", ".join(self._under_way)
        if waiting:
            log.info(f"backup: waiting for {waiting}, {duration(timeout)} at most")
        futures.wait(under_way, timeout)
        self._stop.set()  # a copy under way ends with its next block
        with self._lock:
            left = sorted({*self._under_way, *self._lacking})
            for tag in list(self._under_way):
                self._withdraw(tag)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if left:
            log.warning(
                f"backup: {', '.join(left)} not in {self._backup.where()}; `./launch.sh backup` goes on with it"
            )
        return left

    def _submit(self, tag: str) -> None:
        if not self._withdraw(tag):  # an older one of this name is being read
            self._cadence.failed(tag)
            return
        if role_of(tag) == "epoch" and not (self._directory / tag).exists():
            log.warning(f"backup: {tag} is not copied: retention has deleted it meanwhile")
            self._lacking.discard(tag)
            return
        if not self._attempt(f"begin with {tag}", lambda: self._link(tag)):
            self._note_failure(tag)
            return
        if role_of(tag) == "rolling":  # where the place is slower than the cadence, the newest will do
            for older in [one for one in self._under_way if role_of(one) == "rolling"]:
                self._withdraw(older)
        self._under_way[tag] = self._thread.submit(self._run, tag)

    def _withdraw(self, tag: str) -> bool:
        """Forget a copy that has not begun; False if it has."""
        job = self._under_way.get(tag)
        if job is not None and not job.cancel():
            return False
        if job is not None:
            self._release(tag)
        return True

    def _link(self, tag: str) -> None:
        self._disk.make_directory(self._private)
        commit.link(self._disk, self._directory / tag, self._private, tag)

    def _run(self, tag: str) -> None:
        """In the thread."""
        try:
            if not self._attempt(f"copy {tag}", lambda: self._copy(tag)):
                self._note_failure(tag)
                return
            step = self._step_of(tag)
            pruned = self._attempt("delete old copies", lambda: self._backup.prune(step))
            if pruned and self._reporter is not None:
                self._reporter.recovered(f"{tag} is in {self._backup.where(tag)}", step)
        finally:
            with self._lock:
                self._release(tag)

    def _copy(self, tag: str) -> None:
        self._moved = time.monotonic()
        self._look()
        self._backup.check_apart_from(self._directory)
        begun = time.monotonic()
        sent = self._backup.copy(open_generation(self._private / tag), self._go_on)
        with self._lock:
            superseded = {one for one in self._lacking if role_of(one) == role_of(tag) == "rolling"}
            self._lacking -= {tag, *superseded}
        log.info(f"backup: {tag} is in {self._backup.where(tag)} ({sent:,} bytes, {time.monotonic() - begun:.1f} s)")

    def _look(self) -> None:
        """In the thread, until it works once: the place may be slow or away, and nobody should wait for it."""
        if not self._has_looked:
            self._start_from_what_is_there()
            self._has_looked = True

    def _try_out(self) -> None:
        """In the thread, at the start: a location that cannot be written to is found before the first copy is due."""
        if not self._attempt("see what is there", self._look) or self._reporter is None:
            return
        if self._attempt("write a test file", self._backup.probe):
            self._attempt("copy there", self._backup.claim)

    def _start_from_what_is_there(self) -> None:
        held, local = self._backup.copies(), scan(self._directory)
        with self._lock:
            self._cadence.start_from(held, local)
        if self._backup.shares_disk_with(self._directory):
            log.warning(f"backup: {self._backup.where()} is on the disk of the checkpoints, and is lost with it")

    def _step_of(self, tag: str) -> int:
        return open_generation(self._private / tag).step

    def _go_on(self, size: int) -> None:
        if size:  # 0: it waits for another process
            self._moved = time.monotonic()
        if self._stop.is_set():
            raise StoppedError("the run has ended")

    def _check_stuck(self) -> None:
        """Report a copy that does not move: a mounted file system can hang without any error."""
        silent = time.monotonic() - self._moved
        if silent > _STUCK_SECONDS and self._under_way:
            self._report(f"a copy to {self._backup.where()} has not moved for {duration(silent)}")

    def _note_failure(self, tag: str) -> None:
        with self._lock:
            self._lacking.add(tag)
            self._cadence.failed(tag)

    def _release(self, tag: str) -> None:
        self._under_way.pop(tag, None)
        with contextlib.suppress(OSError):  # swept at the next start
            commit.remove(self._disk, self._private, tag)
            if not any(self._private.iterdir()):
                self._disk.remove_directory(self._private)

    def _attempt(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except StoppedError:
            return False
        except Exception as error:  # from whatever library reaches the place; none of it is worth a run
            text = f"could not {what}: {reason_of(error)}"
            self._report(f"{text} (copies go to {self._backup.where()})")
            log.warning(f"backup: {text}; it is tried again after the next checkpoint")
            return False
        return True

    def _report(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.failed(text)
