from ds_gpt2.state import TrainState


def test_it_counts_steps_tokens_and_skipped_updates() -> None:
    state = TrainState()
    state.advance(100, applied=True)
    state.advance(100, applied=False)
    assert (state.step, state.tokens, state.skipped_steps) == (2, 200, 1)


def test_the_best_validation_loss_is_the_lowest() -> None:
    state = TrainState()
    for loss in (3.0, 2.0, 2.5):
        state.validated(loss)
    assert (state.val_loss, state.best_val_loss) == (2.5, 2.0)


def test_it_survives_the_way_through_a_checkpoint() -> None:
    state = TrainState(step=7, tokens=700, skipped_steps=1, val_loss=3.5, best_val_loss=3.25)
    assert TrainState.from_dict(state.to_dict()) == state
    assert TrainState.from_dict({**state.to_dict(), "of_a_later_version": 1}) == state
