"""Shared parts of the scenes: context, result, and steps such as stopping the run or waiting for its recovery."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.drill.compare import expected_ledger
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess
from ds_gpt2.tools.drill.shrink import EVERY


class NotDoneError(Exception):
    """This machine does not allow the scene; the message says what is missing."""


@dataclass(frozen=True)
class Recovery:
    """The result of a scene in which the run recovered as required."""

    text: str
    lost_steps: int
    lost_seconds: float


@dataclass
class SceneContext:
    """The runs that the scenes act on."""

    run: RunProcess  # the disturbed run
    undisturbed: RunProcess
    generator: random.Random
    folder: Path  # for files by which a fault remembers that it has occurred

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        steps = self.run.settings.schedule.steps
        assert steps is not None
        return steps


@dataclass(frozen=True)
class PlannedFault:
    """A fault that the next start of the run injects into one batch of one rank."""

    batch: int  # also the step, unless batches were skipped
    rank: int
    file: Path  # for ``Fault.once`` or ``Fault.during``
    since: int  # position in the journal before the start


@dataclass(frozen=True)
class Scene:
    """A fault, or several, and the verification that the run recovers."""

    name: str
    play: Callable[[SceneContext], Recovery]
    steps: int = EVERY + 3  # steps that the run trains during the scene, about


def run_to_random_point(context: SceneContext) -> None:
    """Start the run if necessary, and wait until a random moment after the first save since its last start."""
    run = context.run
    if not run.alive:
        run.start()
    wait_for_checkpoint(run)
    until = run.done_steps() + context.generator.randint(1, EVERY - 1)
    run.wait_for(f"step {until}", lambda: run.done_steps() >= until)
    time.sleep(context.generator.uniform(0, 0.3))
    if not run.alive or run.done_steps() >= context.steps:
        raise FailedError(f"the run ended at step {run.done_steps()}, before the fault was injected")


def run_to_fault(context: SceneContext) -> tuple[int, float]:
    """Run to a random point; return the position in the journal and the time in seconds since 1970."""
    run_to_random_point(context)
    return context.run.journal_position(), time.time()


def plan_fault(context: SceneContext, name: str) -> PlannedFault:
    """Stop the run, and choose a random rank and a batch between the next save and the one after it."""
    run = context.run
    stop(run)
    batch = max(0, run.saved_step()) + EVERY + context.generator.randint(1, EVERY - 1)
    return PlannedFault(batch, random_rank(context), context.folder / name, run.journal_position())


def random_rank(context: SceneContext) -> int:
    """Return the rank that a fault affects."""
    return context.generator.randrange(context.run.layout.ranks)


def random_local_rank(context: SceneContext) -> int:
    """Return a rank on this machine, whose process a scene can reach.

    Raises:
        NotDoneError: all ranks are on other hosts.
    """
    if not (ranks := context.run.local_ranks):
        raise NotDoneError("needs ranks on this machine: add it to the hostfile")
    return context.generator.choice(ranks)


def wait_for_checkpoint(run: RunProcess) -> None:
    """Wait for a checkpoint that the run has saved since its last start."""
    run.wait_for("a checkpoint", lambda: _has_saved_since_start(run))


def _has_saved_since_start(run: RunProcess) -> bool:
    saved: list[int] = []
    start_step = -1
    for event in run.events(run.started_at, "launch", "start", "save"):
        if event.kind == "save":
            saved.append(event.step or 0)
        else:
            saved, start_step = [], event.step or 0
    return any(step > start_step for step in saved)


def stop(run: RunProcess) -> None:
    """Stop the run with Ctrl+C, which saves a checkpoint; do nothing if it does not run.

    Raises:
        FailedError: the exit code is not that of a stop.
    """
    if not run.alive:
        return
    run.interrupt()
    verify_stopped(run)


def verify_stopped(run: RunProcess) -> None:
    """Wait until the run ends after Ctrl+C, and verify its exit code."""
    if (code := run.wait_end()) != exit_codes.STOPPED:
        raise FailedError(f"Ctrl+C: exit code {code}, not {exit_codes.STOPPED}")


def stop_with_checkpoint(context: SceneContext) -> None:
    """Stop the run; if it has no checkpoint yet, train until it has one."""
    run = context.run
    if not run.alive and run.saved_step() < 0:
        run_to_random_point(context)
    stop(run)


def stop_and_open_newest(run: RunProcess) -> Generation:
    """Stop the run and return its newest checkpoint."""
    stop(run)
    found = candidates(run.checkpoint_dir, "latest")
    if not found:
        raise FailedError("there is no checkpoint to resume from")
    return found[0]


def wait_for_recovery(run: RunProcess, since: int, reached: int) -> tuple[int, float]:
    """Wait until the run has resumed and trained beyond step ``reached``.

    Args:
        since: position in the journal; earlier starts do not count.

    Returns:
        The step from which the run resumed, and the time of the first new step in seconds since 1970.

    Raises:
        FailedError: the run does not resume, or resumes from before the second newest checkpoint.
    """
    run.wait_for("a new start", lambda: run.events(since, "start"))
    origin = run.events(since, "start")[-1].step or 0
    if origin < reached - 2 * EVERY:
        raise FailedError(f"resumed from step {origin}, although step {reached} was done and every {EVERY} is saved")
    when = run.wait_for("a new step", lambda: run.done_steps() > max(reached, origin))
    return origin, when


def recovery(context: SceneContext, since: int, fault_time: float, reached: int, text: str) -> Recovery:
    """Wait for the recovery of the run, which the supervisor or the scene has restarted, and return what it lost.

    Args:
        since: position in the journal, see ``wait_for_recovery``.
        fault_time: seconds since 1970.
        reached: the last step before the fault.
        text: describes the scene.
    """
    origin, when = wait_for_recovery(context.run, since, reached)
    return Recovery(text, max(0, reached - origin), when - fault_time)


def verify_not_restarted(run: RunProcess, since: int, problem: str) -> None:
    """Verify that the journal has no crash, hang or restart after ``since``."""
    if troubles := run.events(since, "crash", "hang", "restart"):
        raise FailedError(f"{problem}: {troubles[0].text}")


def verify_ledger(context: SceneContext, step: int, batches: Sequence[int]) -> None:
    """Verify that the checkpoint of ``step`` has trained on exactly ``batches`` of the data, in this order."""
    run = context.run
    expected = expected_ledger(run.settings, run.layout.ranks, batches)
    if train_state(run.checkpoint_dir / rolling_tag(step)).ledger != expected:
        raise FailedError(f"the ledger of windows at step {step} is not the expected ledger")


def train_state(checkpoint: Path) -> TrainState:
    """Return the training state of a checkpoint's directory."""
    manifest = open_generation(checkpoint).manifest
    if manifest is None:
        raise FailedError(f"{checkpoint.name} does not exist, or is damaged")
    return TrainState.from_dict(manifest.state)
