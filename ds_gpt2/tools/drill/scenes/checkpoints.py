"""Scenes that damage or remove checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ds_gpt2.checkpoint.catalog import candidates, problem_of
from ds_gpt2.config.settings import LOG
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess, end_all
from ds_gpt2.tools.drill.scenes.scene import (
    Recovery,
    SceneContext,
    run_to_random_point,
    stop,
    wait_for_recovery,
)

_WAITING_SECONDS = 4.0  # for which a run without its checkpoints is observed


def truncate(context: SceneContext) -> Recovery:
    """Cut a file of the newest checkpoint in half."""

    def cut(file: Path) -> str:
        os.truncate(file, file.stat().st_size // 2)
        return "cut in half"

    return _damage_newest(context, cut)


def flip_byte(context: SceneContext) -> Recovery:
    """Flip one bit of a file of the newest checkpoint."""

    def flip(file: Path) -> str:
        offset = context.generator.randrange(file.stat().st_size)
        with file.open("r+b") as opened:
            opened.seek(offset)
            byte = opened.read(1)[0]
            opened.seek(offset)
            opened.write(bytes([byte ^ 1 << context.generator.randrange(8)]))
        return f"one bit of byte {offset:,} flipped"

    return _damage_newest(context, flip)


def _damage_newest(context: SceneContext, damage: Callable[[Path], str]) -> Recovery:
    """Damage a file of the newest checkpoint; the log must name it, and the next older checkpoint must be used."""
    run_to_random_point(context)
    run = context.run
    fault_time = time.time()
    stop(run)
    newest = candidates(run.checkpoint_dir, "latest")[0]
    assert newest.manifest is not None
    file = context.generator.choice(sorted(newest.manifest.files))
    what = damage(newest.path / file)
    intact = next((found for found in candidates(run.checkpoint_dir, "latest") if problem_of(found) is None), None)
    if intact is None:
        raise FailedError("there is no older checkpoint to fall back to")
    log, since = run.run_dir / LOG, run.journal_position()
    log_start = log.stat().st_size
    run.start()
    origin, when = wait_for_recovery(run, since, newest.step)
    if origin != intact.step:
        raise FailedError(f"resumed from step {origin}; the newest intact checkpoint is {intact.tag}")
    with log.open("rb") as opened:
        opened.seek(log_start)
        lines = opened.read().decode(errors="replace").splitlines()
    if not any(newest.tag in line and file in line for line in lines):
        raise FailedError(f"{log} does not name {file} of {newest.tag}")
    text = f"{newest.tag}/{file}: {what}; reported in the log, resumed from {intact.tag}"
    return Recovery(text, newest.step - origin, when - fault_time)


def no_checkpoints(context: SceneContext) -> Recovery:
    """Move the checkpoint directory away before a start; the run must wait for it instead of starting from scratch."""
    run_to_random_point(context)
    run = context.run
    stop(run)
    saved = run.saved_step()
    directory, aside = run.checkpoint_dir, run.checkpoint_dir.with_name(run.checkpoint_dir.name + ".aside")
    since, fault_time = run.journal_position(), time.time()
    directory.rename(aside)
    empty = context.generator.random() < 0.5  # like the mount point of an unmounted disk
    if empty:
        directory.mkdir()
    try:
        _verify_waits_for_checkpoints(run, since, saved)
    except FailedError:
        end_all(run.mark)  # the run may be writing to the directory
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    origin, when = wait_for_recovery(run, since, saved)
    if origin != saved:
        raise FailedError(f"resumed from step {origin}, although step {saved} was saved")
    remains = "an empty directory remained" if empty else "no directory remained"
    text = f"the checkpoints were moved away, {remains}: reported, waited for; resumed from step {saved} afterwards"
    return Recovery(text, 0, when - fault_time)


def _verify_waits_for_checkpoints(run: RunProcess, since: int, saved: int) -> None:
    """Start the run without its checkpoints; verify that it waits and writes no metrics and no checkpoint."""
    directory, records = run.checkpoint_dir, (run.run_dir / METRICS).read_bytes()
    run.start()
    run.wait_for("a report of the missing checkpoints", lambda: run.events(since, "no_checkpoints", "launch"))
    time.sleep(_WAITING_SECONDS)
    if not run.alive or run.events(since, "launch", "start"):
        raise FailedError(f"the run did not wait for its checkpoints, the newest of step {saved}")
    if (run.run_dir / METRICS).read_bytes() != records:
        raise FailedError(f"{METRICS} was changed while the checkpoints were missing")
    if directory.exists() and any(directory.iterdir()):
        raise FailedError(f"files were written to the missing directory: {sorted(directory.iterdir())[0]}")
