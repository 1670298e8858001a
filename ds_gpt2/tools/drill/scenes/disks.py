"""Scenes in which a disk is full: that of the checkpoints, or that of the run's directory.

A small file system in memory is filled. Where the machine does not allow to mount one, a limit on file size makes the
writes fail instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ds_gpt2.checkpoint.catalog import candidates, problem_of, scan
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.run_dir.metrics import METRICS, UNWRITTEN, read_metrics
from ds_gpt2.supervision import rank_processes
from ds_gpt2.tools.drill import small_disk
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess
from ds_gpt2.tools.drill.scenes.scene import (
    Recovery,
    SceneContext,
    stop,
    stop_with_checkpoint,
    verify_not_restarted,
    wait_for_checkpoint,
    wait_for_recovery,
)
from ds_gpt2.tools.drill.shrink import EVERY

_FILE_LIMIT = 4096  # bytes: heartbeats are shorter, the records of a run longer
_NO_SMALL_DISK = "(a limit on file size: no small file system available)"


def disk_full(context: SceneContext) -> Recovery:
    """Fill the disk of the checkpoints during a save; a later save must succeed when space is free again."""
    run = context.run
    stop_with_checkpoint(context)
    manifest = candidates(run.checkpoint_dir, "latest")[0].manifest
    assert manifest is not None
    disks, since = small_disk.for_checkpoints(manifest.bytes), run.journal_position()
    run.start(disks=disks)
    wait_for_checkpoint(run)
    if disks is not None:
        directory = Path(f"/proc/{run.pid}/root{run.checkpoint_dir}")
        full, how = _filled(directory), f"a disk of {disks.checkpoints / 1e6:.0f} MB ran full during a save"
    else:
        directory = run.checkpoint_dir
        limit = max(entry.bytes for entry in manifest.files.values()) // 2  # the largest file cannot be completed
        full = _limited(rank_processes.ranks_of(run.group), limit)
        how = f"the writes of a save failed {_NO_SMALL_DISK}"
    with full as keep_full:
        run.wait_for("a failed save", lambda: keep_full() or run.events(since, "save_failed"))
        reached = run.done_steps()
        run.wait_for("training to continue", lambda: run.done_steps() > reached)
        intact = [found.step for found in scan(directory) if problem_of(found) is None]
        if not intact:
            raise FailedError("no intact checkpoint is left")
    failed, freed = run.events(since, "save_failed")[-1].step or 0, run.journal_position()
    run.wait_for("a save with free space", lambda: any((save.step or 0) > failed for save in run.events(freed, "save")))
    reached, before_stop = run.done_steps(), run.journal_position()
    stop(run)
    run.start()
    wait_for_recovery(run, before_stop, reached)
    text = f"{how}: training continued, {rolling_tag(max(intact))} remained intact, the next save succeeded"
    return Recovery(text, 0, 0.0)


def run_dir_full(context: SceneContext) -> Recovery:
    """Fill the disk of the run's directory: the run must train, save and stop; later its records must be complete."""
    run = context.run
    stop_with_checkpoint(context)
    disks, since = small_disk.for_run_dir(run.run_dir), run.journal_position()
    run.start(disks=disks)
    wait_for_checkpoint(run)
    pids = _pids(run)
    if disks is not None:
        how = f"a disk of {disks.run_dir / 1e6:.0f} MB for the run's directory ran full"
        _train_with_full_run_dir(run)
    else:
        how = f"the run's files could not grow {_NO_SMALL_DISK}"
        reached = run.done_steps()
        with _limited([*rank_processes.ranks_of(run.group), psutil.Process(run.pid)], _FILE_LIMIT):
            run.wait_for("training to continue", lambda: run.done_steps() >= reached + EVERY)
    verify_not_restarted(run, since, "the ranks were restarted")
    if _pids(run) != pids:
        raise FailedError("the ranks were restarted")
    stop(run)
    saved, resumed, fault_time = run.saved_step(), run.journal_position(), time.time()
    run.start()
    origin, when = wait_for_recovery(run, resumed, saved)
    wait_for_checkpoint(run)
    steps = [record["step"] for record in read_metrics(run.run_dir / METRICS)]
    if origin != saved or steps != list(range(1, len(steps) + 1)) or len(steps) <= saved:
        raise FailedError(
            f"resumed from step {origin} of {saved}; {METRICS} has {len(steps)} records, not each step once"
        )
    text = f"{how}: trained, saved, exit code 3; after the resume {METRICS} has every step once"
    return Recovery(text, 0, when - fault_time)


def _train_with_full_run_dir(run: RunProcess) -> None:
    """Keep the disk full until the run has stored records elsewhere and saved a later checkpoint."""
    directory, fallback_file = run.run_dir, run.checkpoint_dir / UNWRITTEN

    def is_stored() -> bool:
        with suppress(OSError):  # the run has just used the remaining space
            small_disk.fill_up(directory)
        return fallback_file.exists()

    run.wait_for(f"records in {fallback_file} that {METRICS} cannot hold", is_stored)
    reached = run.done_steps()
    run.wait_for("a save while the run's directory is full", lambda: run.saved_step() > reached)


@contextmanager
def _filled(directory: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that fills the disk. Call it repeatedly: the run frees space when it deletes checkpoints."""

    def fill() -> None:
        with suppress(OSError):  # a save has just used the remaining space
            small_disk.fill(directory)

    try:
        yield fill
    finally:
        (directory / small_disk.FILLER).unlink(missing_ok=True)


@contextmanager
def _limited(processes: Sequence[psutil.Process], size: int) -> Iterator[Callable[[], None]]:
    """Limit the files that ``processes`` write to ``size`` bytes; yield a function that does nothing."""
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    for process, (_, hard) in zip(processes, before, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
    try:
        yield lambda: None
    finally:
        for process, limits in zip(processes, before, strict=True):
            with suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limits)


def _pids(run: RunProcess) -> list[int]:
    return [run.rank(rank).pid for rank in range(run.layout.ranks)]
