"""Save and restore a run: DeepSpeed's own sharded checkpoints, under the commit protocol."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch

from ds_gpt2 import __version__
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.backup.queue import BackupQueue
from ds_gpt2.checkpoint.catalog import Generation, scan
from ds_gpt2.checkpoint.contents import CLIENT_KEY
from ds_gpt2.checkpoint.deepspeed_io import MODEL_FILE, Serializer, partition_file
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.host_copy import HostMemory
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, PARTIAL, rolling_tag
from ds_gpt2.checkpoint.reshard import repartition
from ds_gpt2.checkpoint.resume import Restored
from ds_gpt2.checkpoint.save import Save
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.rng_state import get_rng_state, seed_everything, set_rng_state
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import count_parameters
from ds_gpt2.model.shape import CHECKPOINT_BYTES
from ds_gpt2.run_dir.journal import Journal

_NOTICEABLE_SECONDS = 0.1
_COPIES_SECONDS = 20.0  # how long a stop waits for backups under way
_LAST_COPIES_SECONDS = 1800.0  # how long the end of a run does

_CLOCK_AHEAD_SECONDS = 3600.0  # a checkpoint of a later time was saved while the clock was wrong: it is ignored

log = logging.getLogger(__name__)


class _Saved(NamedTuple):
    """Which state a checkpoint is of."""

    step: int
    evaluated: bool

    @classmethod
    def of(cls, state: TrainState) -> _Saved:
        return cls(state.step, state.is_evaluated)


class Checkpoints:
    """The checkpoints of one run. At most one save is on its way to the disk; every rank calls every method."""

    def __init__(
        self,
        housekeeping: CheckpointDirectory,
        engine: Engine,
        identity: dict[str, Any],
        run_settings: dict[str, Any],
        backup: Backup | None = None,
        journal: Journal | None = None,
    ) -> None:
        """
        Args:
            housekeeping: of the run's directory, and started.
            identity: what must not change between saving and resuming (model, data, token budget, ...).
            run_settings: recorded with every checkpoint.
            backup: where copies go, if anywhere.
            journal: where rank 0 writes down what was saved and what was not.

        Raises:
            UserError: on every rank: the disk has no room for a single checkpoint.
        """
        self.waited_seconds = 0.0  # training stood still because the disk was slower than the cadence
        self._housekeeping = housekeeping
        self._engine = engine
        self._settings = settings = housekeeping.settings
        self._identity = identity
        self._run_settings = run_settings
        self._journal = journal if collectives.is_main() else None
        self._serializer = Serializer()
        self._memory = HostMemory() if settings.in_background else None
        self._thread = _writer_thread(engine.device) if settings.in_background else None
        self._save: Save | None = None
        self._done: Future[None] | None = None
        self._saved: _Saved | None = None
        self._newest_time = 0.0  # of the checkpoints' manifests, on rank 0
        engine.deepspeed.checkpoint_engine = self._serializer
        engine.deepspeed._copy_recovery_script = lambda _: None  # at every save, on rank 0 alone: housekeeping does it
        self._queue: BackupQueue | None = None
        self._news: BackupReporter | None = None
        collectives.call_on_all_ranks(lambda: self._start(backup))

    @property
    def directory(self) -> Path:
        """``checkpoints/<run>/``, where it is now."""
        return self._housekeeping.directory

    def save(self, state: TrainState, epoch: float, roles: Sequence[str] = ()) -> None:
        """Begin a rolling checkpoint of ``state``. In the background it is copied and written while training goes on;
        the next update waits until it is copied.

        Args:
            epoch: epochs of data seen.
            roles: other tags under which it is to be known (``epoch_00001``, ``best_model``).
        """
        if self.has_saved(state):
            return
        self._hold_back()
        tag = rolling_tag(state.step)
        if not self._is_ready_for(tag):
            self._note_failure(state.step)
            return
        self._engine.deepspeed.save_checkpoint(
            str(self.directory),
            tag=tag + PARTIAL,
            client_state={CLIENT_KEY: {"state": state.to_dict()}},
            save_latest=False,
        )
        contents = self._serializer.take_saved()
        contents[partition_file(collectives.rank())][CLIENT_KEY] = {"rng": get_rng_state()}
        self._saved = _Saved.of(state)
        self._save = Save(
            self._housekeeping.disk,
            self.directory,
            tag,
            collectives.rank(),
            collectives.world_size(),
            contents,
            self._memory,
            self._engine.moment(),
            self._settings.write_mb_per_s * 1e6,
            manifest=_manifest_of(state, epoch, roles, self._identity, self._run_settings, self._next_time()),
            afterwards=partial(
                self._keep_house, roles=roles, step=state.step, val_loss=state.val_loss, taken=time.time()
            ),
        )
        if self._thread is None:
            self._save.run()
            self._settle()
        else:
            self._engine.hold_updates_until(self._save.copied)
            self._done = self._thread.submit(self._save.run)

    def _next_time(self) -> float:
        """When the checkpoint is made, in seconds since 1970; later than any before, also if the clock is set back.

        Copies are ordered by it: after a rollback the highest step is not the newest.
        """
        self._newest_time = max(time.time(), self._newest_time + 1)
        return self._newest_time

    def has_saved(self, state: TrainState) -> bool:
        """Whether ``state`` is committed, after waiting for a save of it that is under way."""
        if self._saved == _Saved.of(state):
            self._settle()
        return self._saved == _Saved.of(state)

    def finish(self, state: TrainState, for_good: bool) -> bool:
        """The end: wait for the save on its way and, for a while, for copies; whether ``state`` is committed.

        Args:
            for_good: the run is complete: nobody wants the machine back in a hurry, and its last state is copied too.
        """
        self._settle()
        saved = self._saved == _Saved.of(state)
        if self._queue is not None:
            if for_good and saved:
                self._queue.offer_last(rolling_tag(state.step), state.step)
            left = self._queue.finish(_LAST_COPIES_SECONDS if for_good else _COPIES_SECONDS)
            if left and for_good and self._news is not None:  # after a stop, the next start makes up for it
                self._news.failed(f"{', '.join(left)} could not be copied before the end of the run", state.step)
        return saved

    def load(self, restored: Restored) -> TrainState:
        """Put the engine and this rank's random state where ``restored`` left them, and make it the newest there is.

        Raises:
            UserError: on every rank: DeepSpeed does not accept the content, or the disk does not take note of it.
        """
        contents = self._cut_for_this_world(restored)
        self._serializer.offer(contents)
        try:
            path, client_state = self._engine.deepspeed.load_checkpoint(
                str(restored.generation.path.parent), tag=restored.generation.tag, load_lr_scheduler_states=False
            )
            assert path is not None, "DeepSpeed found nothing to load"
            state = TrainState.from_dict(client_state[CLIENT_KEY]["state"])
        except Exception as error:
            raise UserError(f"checkpoint {restored.generation.path} cannot be loaded: {error!r}") from error
        finally:
            self._serializer.offer({})
        self._engine.reset_constants()
        if restored.manifest.world_size == collectives.world_size():
            set_rng_state(contents[partition_file(collectives.rank())][CLIENT_KEY]["rng"])
        else:
            seed_everything(
                self._run_settings["run"]["seed"] + collectives.rank() + state.step * collectives.world_size()
            )
        collectives.call_on_all_ranks(lambda: self._continue_from(restored.generation))
        self._saved = _Saved.of(state)
        return state

    def _start(self, backup: Backup | None) -> None:
        if collectives.is_main():
            self._housekeeping.check_free_space(self._estimate())
            times = [found.manifest.made_at for found in scan(self.directory) if found.manifest is not None]
            latest = time.time() + _CLOCK_AHEAD_SECONDS
            self._newest_time = max((made_at for made_at in times if made_at < latest), default=0.0)
            self._news = BackupReporter(self._journal) if self._journal is not None else None
            disk = self._housekeeping.disk
            self._queue = BackupQueue(backup, lambda: self.directory, disk, reporter=self._news) if backup else None

    def _continue_from(self, generation: Generation) -> None:
        if not collectives.is_main():
            return
        try:
            self._housekeeping.resume_from(generation)
        except OSError as error:
            raise UserError(
                f"cannot make {generation.tag} the newest in {self.directory} ({error}): check its permissions and disk"
            ) from None

    def _hold_back(self) -> None:
        """Let the save before this one end: where the disk is slower than the cadence, training waits, and says so."""
        begun = time.monotonic()
        self._settle()
        waited = time.monotonic() - begun
        if waited > _NOTICEABLE_SECONDS:
            self.waited_seconds += waited
            log.warning(
                f"the disk is slower than checkpoint.every: waited {waited:.1f} s for the checkpoint before this one"
                f" ({self.waited_seconds:.1f} s since the start)"
            )

    def _settle(self) -> None:
        """The end of the save that is on its way: all ranks agree whether it became a checkpoint."""
        if self._save is None:
            return
        save, self._save = self._save, None
        save.files_done.wait()
        if collectives.any_rank(not save.wrote, self._engine.device):
            save.aborted.set()
        if self._done is not None:
            self._done.result()
            self._done = None
        if not collectives.any_rank(save.committed, self._engine.device):
            self._note_failure(self._saved.step if self._saved is not None else None)
            self._saved = None

    def _note_failure(self, step: int | None) -> None:
        if self._journal is not None:
            self._journal.write("save_failed", "no checkpoint was saved: train.log says why", step)

    def _keep_house(self, tag: str, roles: Sequence[str], step: int, val_loss: float | None, taken: float) -> None:
        """On rank 0, after a commit. Nothing here is worth ending a run for."""
        log.info(f"step {step}: saved {self.directory / tag}")
        if self._journal is not None:
            self._journal.write("save", f"saved {tag}", step, taken=taken)
            if BEST_TAG in roles:
                self._journal.write("best", f"best validation loss so far, {val_loss:.4f}", step, val_loss=val_loss)
        self._housekeeping.after_commit(tag, roles)
        if self._queue is not None:
            self._queue.offer(tag, roles, step)

    def _is_ready_for(self, tag: str) -> bool:
        ready = collectives.is_main() and self._housekeeping.prepare_for(tag, self._estimate())
        return collectives.any_rank(ready, self._engine.device)

    def _estimate(self) -> int:
        """Bytes of a checkpoint."""
        return CHECKPOINT_BYTES * count_parameters(self._engine.model)

    def _cut_for_this_world(self, restored: Restored) -> dict[str, Any]:
        """The files as this number of ranks would have saved them."""
        saved_by, ranks = restored.manifest.world_size, collectives.world_size()
        if saved_by == ranks:
            return restored.contents
        log.info(
            f"{restored.generation.tag} was saved by {counted(saved_by, 'rank')}: cutting its partitions for {ranks}"
        )
        partitions = [restored.contents[partition_file(rank)] for rank in range(saved_by)]
        sizes = [part.numel() for part in self._engine.deepspeed.optimizer.single_partition_of_fp32_groups]
        try:
            mine = repartition(partitions, collectives.rank(), sizes)
        except ValueError as error:
            raise UserError(
                f"checkpoint {restored.generation.path} was saved by {counted(saved_by, 'rank')}: {error}"
            ) from None
        model = {**restored.contents[MODEL_FILE], "dp_world_size": ranks}
        return {MODEL_FILE: model, partition_file(collectives.rank()): mine}


def _writer_thread(device: torch.device) -> ThreadPoolExecutor:
    """One thread; where the engine is on a GPU, it works on that very one, not on the first."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1, "checkpoint")
    return ThreadPoolExecutor(1, "checkpoint", initializer=torch.cuda.set_device, initargs=(device,))


def _manifest_of(
    state: TrainState,
    epoch: float,
    roles: Sequence[str],
    identity: dict[str, Any],
    run_settings: dict[str, Any],
    made_at: float,
) -> Callable[[dict[str, FileEntry]], Manifest]:
    """The manifest of ``state`` as it is now, but for the files, which are known later."""
    so_far = state.to_dict()
    created = datetime.fromtimestamp(made_at).astimezone().isoformat(timespec="seconds")

    def with_files(files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            created=created,
            epoch=epoch,
            state=so_far,
            roles=list(roles),
            world_size=collectives.world_size(),
            identity=identity,
            settings=run_settings,
            versions=library_versions(),
            files=files,
        )

    return with_files


def library_versions() -> dict[str, str]:
    """Versions that a checkpoint or a run was made with."""
    return {
        "ds_gpt2": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
