import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.engine.train_state import TrainState


def test_it_counts_steps_tokens_and_skipped_updates() -> None:
    state = TrainState()
    state.advance(100, applied=True, windows=b"first")
    state.advance(100, applied=False, windows=b"second")
    assert (state.step, state.tokens, state.skipped_steps) == (2, 200, 1)


def test_the_ledger_depends_on_the_windows_and_their_order() -> None:
    ledgers = set()
    for windows in ("ab", "ba", "aab", "a", ""):
        state = TrainState()
        for window in windows:
            state.advance(1, applied=True, windows=window.encode())
        ledgers.add(state.ledger)
    assert len(ledgers) == 5


def test_a_validation_belongs_to_its_step() -> None:
    state = TrainState(step=5)
    state.record_validation(2.0)
    state.advance(1, applied=True, windows=b"")
    state.record_validation(2.5)
    assert (state.val_loss, state.val_step, state.best_val_loss, state.best_step) == (2.5, 6, 2.0, 5)


def test_the_best_validation_loss_is_the_lowest() -> None:
    state = TrainState()
    for loss in (3.0, 2.0, 2.5):
        state.record_validation(loss)
    assert (state.val_loss, state.best_val_loss) == (2.5, 2.0)


def test_the_state_survives_a_checkpoint() -> None:
    state = TrainState(step=7, tokens=700, skipped_steps=1, val_loss=3.5, best_val_loss=3.25, ledger="ab")
    assert TrainState.from_dict(state.to_dict()) == state
    assert TrainState.from_dict({**state.to_dict(), "of_a_later_version": 1}) == state


def test_a_step_is_recorded_once_it_is_evaluated() -> None:
    assert TrainState(step=7).recorded_step == 7
    assert TrainState(step=7, unevaluated={}).recorded_step == 6


def test_excluded_batches_are_never_next() -> None:
    state = TrainState()
    state.exclude([3, 2, 5])
    state.exclude([5])
    seen = []
    for _ in range(5):
        seen.append(state.next_batch)
        state.advance(10, applied=True, windows=b"")
        assert (state.batch, state.previous_batch) == (seen[-1], seen[-2] if len(seen) > 1 else 0)
    assert seen == [1, 4, 6, 7, 8]
    assert (state.step, state.left_out) == (5, [2, 3, 5])


def test_a_checkpoint_of_an_earlier_version_continues_with_the_next_batch() -> None:
    old = {"step": 7, "tokens": 700}
    assert TrainState.from_dict(old).next_batch == 8


def test_updates_skipped_in_a_row_are_counted() -> None:
    state = TrainState()
    for applied in (False, True, False, False):
        state.advance(10, applied=applied, windows=b"")
    assert (state.skipped_in_row, state.skipped_steps, state.updates) == (2, 3, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_validation_loss_is_never_the_best(bad: float) -> None:
    state = TrainState(step=5)
    state.record_validation(bad)
    assert (state.val_loss, state.best_val_loss, state.best_step) == (None, None, None)
    state.record_validation(2.0)
    state.step = 6
    state.record_validation(bad)
    assert (state.val_loss, state.val_step, state.best_val_loss, state.best_step) == (2.0, 5, 2.0, 5)


def test_a_run_whose_best_is_nan_recovers_at_the_next_finite_loss() -> None:
    """As a checkpoint of an earlier version may say."""
    saved = {"step": 5, "val_loss": math.nan, "val_step": 5, "best_val_loss": math.nan, "best_step": 5}
    state = TrainState.from_dict(saved)
    assert (state.val_loss, state.val_step, state.best_val_loss, state.best_step) == (None, None, None, None)
    state.record_validation(7.0)
    assert (state.best_val_loss, state.best_step) == (7.0, 5)


def test_batches_that_were_trained_on_are_not_recorded_as_excluded() -> None:
    state = TrainState(step=4, batch=5, left_out=[2])
    state.exclude([2, 3, 6])
    assert state.left_out == [2, 6]


def test_many_batches_can_be_excluded() -> None:
    state = TrainState()
    state.exclude(range(9, 1_000_000))
    for _ in range(20):
        state.advance(1, True, b"")
    assert state.batch == 1_000_011


@given(st.sets(st.integers(1, 30)), st.integers(0, 30))
def test_the_next_batch_is_the_first_that_is_not_excluded(left_out: set[int], batch: int) -> None:
    state = TrainState(batch=batch, left_out=sorted(left_out))
    assert state.next_batch == next(one for one in range(batch + 1, 100) if one not in left_out)


@pytest.mark.parametrize(
    ("best_step", "val_step", "expected"), [(5, 5, None), (5, 10, 10), (10, 10, 10), (12, 12, 12), (None, None, None)]
)
def test_a_fork_forgets_the_best_loss_of_its_parent(
    best_step: int | None, val_step: int | None, expected: int | None
) -> None:
    losses = {None: None, 5: 2.0, 10: 2.5, 12: 1.5}
    state = TrainState(val_loss=losses[val_step], val_step=val_step)
    state.best_val_loss, state.best_step = losses[best_step], best_step
    state.forget_best_before(10)
    assert (state.best_val_loss, state.best_step) == (losses[expected], expected)
    assert (state.val_loss, state.val_step) == (losses[val_step], val_step)
