from ds_gpt2.state import TrainState


def test_it_counts_steps_tokens_and_skipped_updates() -> None:
    state = TrainState()
    state.advance(100, applied=True, windows=b"first")
    state.advance(100, applied=False, windows=b"second")
    assert (state.step, state.tokens, state.skipped_steps) == (2, 200, 1)


def test_the_ledger_tells_apart_what_was_seen_and_in_which_order() -> None:
    ledgers = set()
    for windows in ("ab", "ba", "aab", "a", ""):
        state = TrainState()
        for window in windows:
            state.advance(1, applied=True, windows=window.encode())
        ledgers.add(state.ledger)
    assert len(ledgers) == 5


def test_a_validation_belongs_to_its_step() -> None:
    state = TrainState(step=5)
    state.validated(2.0)
    state.advance(1, applied=True, windows=b"")
    state.validated(2.5)
    assert (state.val_loss, state.val_step, state.best_val_loss, state.best_step) == (2.5, 6, 2.0, 5)


def test_the_best_validation_loss_is_the_lowest() -> None:
    state = TrainState()
    for loss in (3.0, 2.0, 2.5):
        state.validated(loss)
    assert (state.val_loss, state.best_val_loss) == (2.5, 2.0)


def test_it_survives_the_way_through_a_checkpoint() -> None:
    state = TrainState(step=7, tokens=700, skipped_steps=1, val_loss=3.5, best_val_loss=3.25, ledger="ab")
    assert TrainState.from_dict(state.to_dict()) == state
    assert TrainState.from_dict({**state.to_dict(), "of_a_later_version": 1}) == state
