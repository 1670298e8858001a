"""Scenes that compare the run with the undisturbed run: at its end, and on another number of ranks."""

from __future__ import annotations

import time

from ds_gpt2.checkpoint.catalog import candidates, open_generation, problem_of
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.batch_plan import fit_ranks
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences, expected_ledger, loss_by_step
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess
from ds_gpt2.tools.drill.scenes.scene import (
    NotDoneError,
    Recovery,
    SceneContext,
    stop_and_open_newest,
    train_state,
    verify_ledger,
)

# Mean losses on another number of ranks differ by rounding in bf16; with dropout, the masks differ as well.
_LOSS_TOLERANCE, _LOSS_TOLERANCE_WITH_DROPOUT = 0.02, 0.15


def bit_for_bit(context: SceneContext) -> Recovery:
    """Train to the last step; the run must then equal the undisturbed run bit for bit."""
    run = context.run
    if not run.alive:
        run.start()
    run.wait_done()
    tag = rolling_tag(context.steps)
    found = curve_differences(context.undisturbed.run_dir, run.run_dir)
    found += checkpoint_differences(context.undisturbed.checkpoint_dir / tag, run.checkpoint_dir / tag)
    ledger = expected_ledger(run.settings, run.layout.ranks, range(1, context.steps + 1))
    if train_state(run.checkpoint_dir / tag).ledger != ledger:
        found.append("the ledger of windows is not that of batches 1, 2, 3, ...")
    if found:
        raise FailedError(f"{len(found)} differences from the undisturbed run: {'; '.join(found[:3])}")
    text = f"after {context.steps} steps: curves, weights, moments, random states and ledger equal the undisturbed"
    return Recovery(f"{text} run's", 0, 0.0)


def other_ranks(context: SceneContext) -> Recovery:
    """Train the same batches on another number of ranks, then continue on the original number."""
    run, steps = context.run, context.steps
    ranks, micro_batch = _another_number_of_ranks(run)
    stop_and_open_newest(run)
    older = next((found for found in candidates(run.checkpoint_dir, f"before:{steps}") if not problem_of(found)), None)
    if older is None or older.step >= steps:
        raise FailedError("there is no older checkpoint to resume from")
    since, start_time = run.journal_position(), time.time()
    run.start(f"batch.micro_batch={micro_batch}", f"schedule.steps={steps}", resume=older.tag, ranks=ranks)
    run.wait_for("a new start", lambda: run.events(since, "start"))
    seconds = time.time() - start_time
    run.wait_done()
    manifest = open_generation(run.checkpoint_dir / rolling_tag(steps)).manifest
    if manifest is None or manifest.world_size != ranks:
        raise FailedError(f"{rolling_tag(steps)} is not of {ranks} ranks")
    verify_ledger(context, steps, range(1, steps + 1))
    difference = largest_loss_difference(context, older.step, steps)
    run.start(f"schedule.steps={steps + 1}")
    run.wait_done()
    verify_ledger(context, steps + 1, range(1, steps + 2))
    text = f"{run.layout.ranks} -> {ranks} -> {run.layout.ranks} ranks at step {older.step}: the same windows each step"
    return Recovery(f"{text}, losses within {100 * difference:.2f}%", 0, seconds)


def _another_number_of_ranks(run: RunProcess) -> tuple[int, int]:
    """Return (ranks, micro-batch) with the same token budget.

    Raises:
        NotDoneError: there is no other GPU, or the token budget cannot be divided otherwise.
    """
    batch, now = run.settings.batch, run.layout.ranks
    if now == 1 and run.layout.accelerator == "cuda":
        raise NotDoneError("needs a second GPU")
    ranks, micro_batch = fit_ranks(
        batch.tokens_per_step, batch.micro_batch, batch.sequence_length, now - 1 if now > 1 else 2
    )
    if ranks == now:
        raise NotDoneError("needs a token budget of more than one window per step")
    return ranks, micro_batch


def largest_loss_difference(context: SceneContext, after: int, last: int) -> float:
    """Return the largest relative difference between a step's loss and that of the undisturbed run.

    Args:
        after: the steps after this one, up to ``last``, are compared.

    Raises:
        FailedError: it is too large.
    """
    losses, expected = (loss_by_step(run.run_dir) for run in (context.run, context.undisturbed))
    difference = max(abs(losses[step] / expected[step] - 1) for step in range(after + 1, last + 1))
    dropout = context.run.settings.model.dropout
    tolerance = _LOSS_TOLERANCE_WITH_DROPOUT if dropout else _LOSS_TOLERANCE
    if not difference <= tolerance:
        raise FailedError(f"a loss differs by {100 * difference:.1f}% from that of the undisturbed run")
    return difference
