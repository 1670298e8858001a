"""Save and restore a run: DeepSpeed's sharded checkpoints, committed atomically."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_gpt2 import __version__
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.backup.queue import BackupQueue
from ds_gpt2.checkpoint.catalog import Generation, scan
from ds_gpt2.checkpoint.content_checks import CLIENT_KEY
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest, read
from ds_gpt2.checkpoint.naming import BEST_TAG, PARTIAL, rolling_tag
from ds_gpt2.checkpoint.reshard import repartition
from ds_gpt2.checkpoint.resume import Restored
from ds_gpt2.checkpoint.save import Save
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import HOUR, counted
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file
from ds_gpt2.engine.checkpoint_keys import WORLD_SIZE
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.host_copy import HostMemory
from ds_gpt2.engine.rng_state import get_rng_state, rank_seed, seed_everything, set_rng_state
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.run_dir.journal import Journal

_NOTICEABLE_SECONDS = 0.1
_STOP_COPY_SECONDS = 20.0  # how long a stop waits for running backups
_LAST_COPY_SECONDS = 1800.0  # how long the end of a complete run waits

_CLOCK_AHEAD_SECONDS = HOUR  # times of checkpoints later than this are ignored: the clock was wrong

log = logging.getLogger(__name__)


class _Saved(NamedTuple):
    """Identifies the state of a checkpoint."""

    step: int
    evaluated: bool

    @classmethod
    def of(cls, state: TrainState) -> _Saved:
        return cls(state.step, state.is_evaluated)


class Checkpoints:
    """The checkpoints of one run. At most one save is in progress; every rank calls every method."""

    def __init__(
        self,
        checkpoint_dir: CheckpointDirectory,
        engine: Engine,
        identity: dict[str, Any],
        run_settings: dict[str, Any],
        backup: Backup | None = None,
        journal: Journal | None = None,
    ) -> None:
        """
        Args:
            checkpoint_dir: the run's directory of checkpoints; started.
            identity: the settings that must not change between saving and resuming (model, data, token budget, ...).
            run_settings: recorded with every checkpoint.
            backup: the run's backups, if it has any.
            journal: rank 0 records saves and failures in it.

        Raises:
            UserError: on every rank: the disk has no space for a single checkpoint.
        """
        self.waited_seconds = 0.0  # time that training waited for slow saves
        self._checkpoint_dir = checkpoint_dir
        self._engine = engine
        self._settings = settings = checkpoint_dir.settings
        self._identity = identity
        self._run_settings = run_settings
        self._journal = journal if collectives.is_main() else None
        self._memory = HostMemory() if settings.in_background else None
        self._thread = _writer_thread(engine.device) if settings.in_background else None
        self._save: Save | None = None
        self._in_thread: list[Future[None]] = []  # what is done in the background for the newest save
        self._saved: _Saved | None = None
        self._completed: _Saved | None = None  # a state whose evaluation is being recorded
        self._is_complete = True  # on rank 0: that has not failed
        self._newest_time = 0.0  # of the checkpoints' manifests, on rank 0
        self._queue: BackupQueue | None = None
        self._backup_reporter: BackupReporter | None = None
        collectives.call_on_all_ranks(lambda: self._start(backup))

    @property
    def directory(self) -> Path:
        """The current path of ``checkpoints/<run>/``."""
        return self._checkpoint_dir.directory

    def save(self, state: TrainState, epoch: float, roles: Sequence[str] = ()) -> None:
        """Start saving a rolling checkpoint of ``state``. In the background it is copied and written while training
        continues; the next update waits until it is copied.

        Args:
            epoch: epochs of data seen.
            roles: other tags for the same files (``epoch_00001``, ``best_model``).
        """
        if self.has_saved(state):
            return
        self._wait_for_previous_save()
        tag = rolling_tag(state.step)
        if not self._is_ready_for(tag):
            self._note_failure(state.step)
            return
        client_state = {CLIENT_KEY: {"state": {**state.to_dict(), "unevaluated": None}}}  # complete in the manifest
        contents = self._engine.save_checkpoint(self.directory, tag + PARTIAL, client_state)
        contents[partition_file(collectives.rank())][CLIENT_KEY] = {"rng": get_rng_state()}
        self._saved = _Saved.of(state)
        self._save = Save(
            self._checkpoint_dir.disk,
            self.directory,
            tag,
            collectives.rank(),
            collectives.world_size(),
            contents,
            self._memory,
            self._engine.record_event(),
            self._settings.write_mb_per_s * 1e6,
            manifest=self._manifest_of(state, epoch, roles),
            afterwards=partial(self._after_commit, roles=roles, state=replace(state), taken=time.time()),
        )
        if self._thread is None:
            self._save.run()
            self._settle()
        else:
            self._engine.hold_updates_until(self._save.copied)
            self._in_thread.append(self._thread.submit(self._save.run))

    def add_evaluation(self, state: TrainState, roles: Sequence[str] = ()) -> bool:
        """Record the evaluation of ``state`` in the manifest of its checkpoint, if that was saved without it.

        The checkpoint may still be in the process of being saved. A failure shows in ``has_saved``.

        Args:
            roles: see ``save``.

        Returns:
            Whether there is such a checkpoint.
        """
        if self._saved != _Saved(state.step, evaluated=False) or not state.is_evaluated:
            return False
        self._saved = self._completed = _Saved.of(state)
        action = partial(self._write_evaluation, self._save, state.to_dict(), roles, state.step, state.val_loss)
        if self._thread is None:
            action()
            self._settle()
        else:
            self._in_thread.append(self._thread.submit(action))  # after the save: it is one thread
        return True

    def _write_evaluation(
        self, save: Save | None, state: dict[str, Any], roles: Sequence[str], step: int, val_loss: float | None
    ) -> None:
        """Write the manifest with the evaluation, on rank 0. If that fails, a resume repeats the evaluation.

        Args:
            save: of the checkpoint; None: it was committed before.
        """
        if not collectives.is_main() or (save is not None and not save.committed):
            return
        tag = rolling_tag(step)
        try:
            before = read(self.directory / tag)
            manifest = before.model_copy(update={"state": state, "roles": list(roles)})
            commit.replace_manifest(self._checkpoint_dir.disk, self.directory / tag, manifest)
        except (OSError, DamagedError) as error:
            log.error(f"the evaluation of step {step} is not recorded in {tag} ({error}): a resume from it repeats it")
            self._is_complete = False
        self._after_evaluation(tag, roles, step, val_loss)

    def _manifest_of(
        self, state: TrainState, epoch: float, roles: Sequence[str]
    ) -> Callable[[dict[str, FileEntry]], Manifest]:
        """Return a function that builds the manifest of the present ``state`` once the files are known."""
        created = datetime.fromtimestamp(self._next_time()).astimezone().isoformat(timespec="seconds")
        fixed: dict[str, Any] = {"created": created, "epoch": epoch, "state": state.to_dict(), "roles": list(roles)}
        return lambda files: Manifest(
            **fixed,
            world_size=collectives.world_size(),
            identity=self._identity,
            settings=self._run_settings,
            versions=library_versions(),
            files=files,
        )

    def _next_time(self) -> float:
        """Return the time of the checkpoint, in seconds since 1970: always later than earlier ones, also if the clock
        is set back. Backups are ordered by it: after a rollback the highest step is not the newest.
        """
        self._newest_time = max(time.time(), self._newest_time + 1)
        return self._newest_time

    def has_saved(self, state: TrainState) -> bool:
        """Return whether ``state`` is committed; wait if a save of it is in progress."""
        if self._saved == _Saved.of(state):
            self._settle()
        return self._saved == _Saved.of(state)

    def finish(self, state: TrainState, complete: bool) -> bool:
        """Wait for the save in progress and, for a limited time, for backups; return whether ``state`` is committed.

        Args:
            complete: all steps of the run are done: wait longer for backups, and back up the last state too.
        """
        self._settle()
        saved = self._saved == _Saved.of(state)
        if self._queue is not None:
            if complete and saved:
                self._queue.offer_last(rolling_tag(state.step), state.step)
            elif saved and not state.is_evaluated:
                self._queue.offer(rolling_tag(state.step), (), state.step)
            left = self._queue.finish(_LAST_COPY_SECONDS if complete else _STOP_COPY_SECONDS)
            if left and complete and self._backup_reporter is not None:  # after a stop, the next start backs them up
                self._backup_reporter.failed(
                    f"{', '.join(left)} could not be backed up before the end of the run", state.step
                )
        return saved

    def load(self, restored: Restored) -> TrainState:
        """Restore the engine and this rank's random state from ``restored``, and make it the newest checkpoint.

        Raises:
            UserError: on every rank: DeepSpeed rejects the contents, or the directory cannot be written.
        """
        contents = self._repartitioned(restored)
        generation = restored.generation
        try:
            self._engine.load_checkpoint(generation.path.parent, generation.tag, contents)
            state = TrainState.from_dict(restored.manifest.state)  # DeepSpeed's client state lacks the evaluation
        except Exception as error:  # DeepSpeed raises exceptions of many types
            raise UserError(f"checkpoint {generation.path} cannot be loaded: {error!r}") from error
        if restored.manifest.world_size == collectives.world_size():
            set_rng_state(contents[partition_file(collectives.rank())][CLIENT_KEY]["rng"])
        else:
            seed_everything(rank_seed(self._run_settings["run"]["seed"], state.step))
        self._log_average(restored)
        collectives.call_on_all_ranks(lambda: self._continue_from(restored.generation))
        # An epoch checkpoint has no rolling one that could receive the evaluation: the state is saved again.
        is_alone = restored.generation.role == "epoch" and not state.is_evaluated
        self._saved = None if is_alone else _Saved.of(state)
        return state

    def _log_average(self, restored: Restored) -> None:
        """Log whether the moving average of the weights continues, starts or is dropped."""
        tag, saved, ours = restored.generation.tag, restored.manifest.ema_decay, self._engine.average
        if ours is not None and saved is not None:
            log.info(f"the moving average of the weights continues from {tag} (ema.decay {ours.decay})")
        elif ours is not None:
            log.info(f"{tag} has no moving average of the weights: it starts from its weights (ema.decay {ours.decay})")
        elif saved is not None:
            log.warning(
                f"{tag} has a moving average of the weights, which this run drops, because ema.decay is not set: later"
                f" checkpoints do not have it. To continue it, stop and resume from {tag} with ema.decay={saved}"
            )

    def _start(self, backup: Backup | None) -> None:
        if collectives.is_main():
            self._checkpoint_dir.check_free_space(self._engine.checkpoint_bytes)
            times = [found.manifest.made_at for found in scan(self.directory) if found.manifest is not None]
            latest = time.time() + _CLOCK_AHEAD_SECONDS
            self._newest_time = max((made_at for made_at in times if made_at < latest), default=0.0)
            self._backup_reporter = BackupReporter(self._journal) if self._journal is not None else None
            disk = self._checkpoint_dir.disk
            self._queue = (
                BackupQueue(backup, lambda: self.directory, disk, reporter=self._backup_reporter) if backup else None
            )

    def _continue_from(self, generation: Generation) -> None:
        if not collectives.is_main():
            return
        try:
            self._checkpoint_dir.resume_from(generation)
        except OSError as error:
            raise UserError(
                f"cannot make {generation.tag} the newest in {self.directory} ({error}): check its permissions and disk"
            ) from None

    def _wait_for_previous_save(self) -> None:
        """Wait until the previous save has ended; log a warning if the disk is slower than the save interval."""
        start = time.monotonic()
        self._settle()
        waited = time.monotonic() - start
        if waited > _NOTICEABLE_SECONDS:
            self.waited_seconds += waited
            log.warning(
                f"the disk is slower than checkpoint.every: waited {waited:.1f} s for the previous checkpoint"
                f" ({self.waited_seconds:.1f} s since the start)"
            )

    def _settle(self) -> None:
        """Wait for the save in progress; all ranks agree whether it was committed."""
        save, self._save = self._save, None
        if save is not None:
            save.files_done.wait()
            if collectives.any_rank(not save.wrote, self._engine.device):
                save.aborted.set()
        for work in self._in_thread:
            work.result()
        self._in_thread = []
        if save is not None and not collectives.any_rank(save.committed, self._engine.device):
            self._note_failure(self._saved.step if self._saved is not None else None)
            self._saved = self._completed = None
        completed, self._completed = self._completed, None
        if completed is not None and collectives.any_rank(not self._is_complete, self._engine.device):
            self._saved = completed._replace(evaluated=False)
        self._is_complete = True

    def _note_failure(self, step: int | None) -> None:
        if self._journal is not None:
            self._journal.write("save_failed", "no checkpoint was saved: train.log has the reason", step)

    def _after_commit(self, tag: str, roles: Sequence[str], state: TrainState, taken: float) -> None:
        """Log and journal the commit, prune, and queue backups, on rank 0. A failure here does not end the run.

        Args:
            state: as it was saved.
            taken: when, in seconds since 1970.
        """
        log.info(f"step {state.step}: saved {self.directory / tag}")
        if self._journal is not None:
            self._journal.write("save", f"saved {tag}", state.step, taken=taken)
        if state.is_evaluated:
            self._after_evaluation(tag, roles, state.step, state.val_loss)
        else:  # roles and backups follow
            self._checkpoint_dir.after_commit(tag, ())

    def _after_evaluation(self, tag: str, roles: Sequence[str], step: int, val_loss: float | None) -> None:
        if self._journal is not None and BEST_TAG in roles:
            self._journal.write("best", f"best validation loss so far, {val_loss:.4f}", step, val_loss=val_loss)
        self._checkpoint_dir.after_commit(tag, roles)
        if self._queue is not None:
            self._queue.offer(tag, roles, step)

    def _is_ready_for(self, tag: str) -> bool:
        ready = collectives.is_main() and self._checkpoint_dir.prepare_for(tag, self._engine.checkpoint_bytes)
        return collectives.any_rank(ready, self._engine.device)

    def _repartitioned(self, restored: Restored) -> dict[str, Any]:
        """Return the files as the present number of ranks would have saved them."""
        saved_by, ranks = restored.manifest.world_size, collectives.world_size()
        if saved_by == ranks:
            return restored.contents
        log.info(f"{restored.generation.tag} was saved by {counted(saved_by, 'rank')}: repartitioning it for {ranks}")
        partitions = [restored.contents[partition_file(rank)] for rank in range(saved_by)]
        try:
            mine = repartition(partitions, collectives.rank(), self._engine.partition_sizes())
        except ValueError as error:
            raise UserError(
                f"checkpoint {restored.generation.path} was saved by {counted(saved_by, 'rank')}: {error}"
            ) from None
        model = {**restored.contents[MODEL_FILE], WORLD_SIZE: ranks}
        return {MODEL_FILE: model, partition_file(collectives.rank()): mine}


def _writer_thread(device: torch.device) -> ThreadPoolExecutor:
    """Return a pool of one thread that uses the engine's GPU, if it has one."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1, "checkpoint")
    return ThreadPoolExecutor(1, "checkpoint", initializer=torch.cuda.set_device, initargs=(device,))


def library_versions() -> dict[str, str]:
    """Return the versions that a checkpoint or a start is recorded with."""
    return {
        "ds_gpt2": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
    }
