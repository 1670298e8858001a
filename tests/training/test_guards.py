"""Anomalies that the guard reports, and its reactions."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.config.settings import GuardSettings
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.training.guards import Anomaly, Guard, spike_score


def _losses(count: int, seed: int = 0) -> list[float]:
    """Return losses like those of a run: decreasing, with noise."""
    noise = random.Random(seed)
    return [3.0 + 8.0 * math.exp(-step / 300) + noise.gauss(0, 0.03) for step in range(count)]


class Run:
    """Perform the guard's part of training steps, without a model."""

    def __init__(self, **settings: object) -> None:
        self.reported: list[Anomaly] = []
        self.guard = Guard(GuardSettings.model_validate(settings), self.reported.append)
        self.state = TrainState()
        self.applied: list[bool] = []

    def step(self, loss: float, grad_norm: float = 1.0, windows: bytes | None = None) -> None:
        accepted = self.guard.check_loss(self.state, loss)
        norm = grad_norm if accepted else math.inf
        applied = accepted and math.isfinite(norm) and self.guard.check_gradient(self.state, norm)
        windows = str(self.state.next_batch).encode() if windows is None else windows
        self.state.advance(10, applied, windows)
        self.guard.check_update(self.state, loss, norm, applied, windows)
        self.applied.append(applied)

    @property
    def kinds(self) -> list[str]:
        return [anomaly.kind for anomaly in self.reported]


def test_a_normal_run_raises_no_anomaly() -> None:
    for seed in range(5):
        run = Run()
        for loss in _losses(3000, seed):
            run.step(loss)
        assert run.reported == [] and all(run.applied)


def test_a_spike_is_reported_and_not_added_to_the_recent_losses() -> None:
    run = Run()
    for loss in [*_losses(1000), 6.0, *_losses(1000)[900:]]:
        run.step(loss)
    (spike,) = run.reported
    assert (spike.kind, spike.step, spike.batches, spike.policy) == ("spike", 1001, (1001,), "alert")
    assert all(run.applied) and run.guard.rollback is None
    assert max(run.state.recent_losses) < 4


def test_a_skipped_spike_is_not_applied_and_reported_once() -> None:
    run = Run(spike="skip")
    for loss in [*_losses(500), 20.0, 3.5]:
        run.step(loss)
    assert run.applied == [True] * 500 + [False, True]
    assert run.kinds == ["spike"]
    assert run.state.skipped_steps == 1


def test_a_divergence_rolls_back_to_before_the_first_high_loss() -> None:
    run = Run(divergence_steps=5)
    run.state.exclude([503])
    for loss in [*_losses(500), *[9.0] * 5]:
        run.step(loss)
    assert run.kinds == ["spike", "divergence"]
    assert run.reported[1].text.endswith(", 5 in a row")
    assert run.guard.rollback is not None
    assert (run.guard.rollback.first_step, run.guard.rollback.batches) == (501, (501, 502, 504, 505, 506))


def test_a_rollback_excludes_exactly_the_high_and_non_finite_batches() -> None:
    run = Run(divergence_steps=3, skipped_run_steps=50)
    for loss in [*_losses(100), 20.0, *_losses(101)[100:], 20.0, math.nan, 20.0, math.nan, 20.0]:
        run.step(loss)
    assert run.guard.rollback is not None
    assert (run.guard.rollback.first_step, run.guard.rollback.batches) == (103, (103, 104, 105, 106, 107))


def test_a_state_without_anomalies_is_healthy() -> None:
    run = Run(divergence_steps=5)
    for loss in _losses(29):
        run.step(loss)
    assert not run.state.is_healthy  # too few losses to decide
    run.step(_losses(30)[-1])
    assert run.state.is_healthy
    run.step(15.0)
    assert not run.state.is_healthy
    run.step(_losses(31)[-1])
    assert run.state.is_healthy
    run.step(_losses(32)[-1], grad_norm=math.inf)
    assert not run.state.is_healthy


def test_after_a_divergence_alert_later_losses_are_compared_with_the_new_level() -> None:
    run = Run(divergence="alert", divergence_steps=5)
    for loss in [*_losses(500), *[9.0 + 0.01 * number for number in range(200)]]:
        run.step(loss)
    assert run.kinds == ["spike", "divergence"]
    assert run.guard.rollback is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_never_reaches_the_weights(loss: float) -> None:
    run = Run()
    for value in [*_losses(100), loss]:
        run.step(value)
    assert run.applied[-1] is False
    assert run.kinds == ["not_finite"] and "the loss" in run.reported[0].text
    assert all(map(math.isfinite, run.state.recent_losses))


def test_many_skipped_updates_in_a_row_cause_a_rollback() -> None:
    run = Run(skipped_run_steps=3)
    for finite in [True, False, False, True, False, False, False]:
        run.step(3.0, grad_norm=1.0 if finite else math.inf)
    assert run.kinds == ["not_finite"] * 5 + ["skipped_run"]
    assert run.reported[0].text == "the gradient norm is Inf or NaN: update skipped"
    assert run.guard.rollback is not None
    assert (run.guard.rollback.first_step, run.guard.rollback.batches) == (5, (5, 6, 7))


def test_repeated_windows_are_reported() -> None:
    run = Run()
    for windows in [b"1", b"2", b"2", b"3"]:
        run.step(3.0, windows=windows)
    assert [(anomaly.kind, anomaly.step) for anomaly in run.reported] == [("stuck_data", 3)]


def test_differing_weights_name_the_rank_and_cause_a_rollback() -> None:
    run = Run()
    run.step(3.0)
    run.guard.check_weights(run.state, ["a", "a", "b", "a"])
    assert run.kinds == ["drift"] and "rank 2" in run.reported[0].text
    assert run.guard.rollback is not None and run.guard.rollback.first_step == 1
    run.guard.check_weights(run.state, ["a", "b", "a", "c", "a"])
    assert run.reported[1].text == "the weights differ between ranks (ranks 1, 3 differ)"


def test_frozen_weights_are_reported_unless_no_update_was_applied() -> None:
    run = Run()
    run.step(3.0)
    run.guard.check_weights(run.state, ["a", "a"])
    run.step(3.0, grad_norm=math.inf)
    run.guard.check_weights(run.state, ["a", "a"])
    assert run.kinds == ["not_finite"]
    run.step(3.0)
    run.guard.check_weights(run.state, ["a", "a"])
    assert run.kinds == ["not_finite", "frozen"] and "1 update without a change" in run.reported[1].text


def test_a_disabled_guard_reports_nothing() -> None:
    run = Run(spike="off", divergence="off", skipped_run="off", drift="off", frozen="off", stuck_data="off")
    for loss in [*_losses(100), *[50.0] * 30]:
        run.step(loss, windows=b"")
    run.guard.check_weights(run.state, ["a", "b"])
    assert run.reported == []


def test_a_resume_does_not_change_what_is_reported() -> None:
    losses = [*_losses(300), 20.0, *_losses(300)[250:], *[9.0] * 25]
    whole = Run()
    for loss in losses:
        whole.step(loss)
    parts, reported = Run(), []
    for number, loss in enumerate(losses):
        if number % 37 == 0:
            reported += parts.reported
            resumed = Run()
            resumed.state = TrainState.from_dict(parts.state.to_dict())
            parts = resumed
        parts.step(loss)
    assert reported + parts.reported == whole.reported
    assert parts.state == whole.state


@given(st.lists(st.floats(1e-3, 1e3), min_size=30, max_size=100), st.floats(1e-3, 1e3))
def test_a_loss_within_the_recent_range_has_a_low_score(losses: list[float], scale: float) -> None:
    """The score is in deviations: scaling the losses does not change it."""
    score = spike_score(losses, max(losses))
    scaled = spike_score([scale * loss for loss in losses], scale * max(losses))
    assert score is not None and scaled is not None
    assert scaled == pytest.approx(score, rel=1e-6, abs=1e-6)
    middle = sorted(losses)[len(losses) // 2]
    below = spike_score(losses, min(middle, min(losses)))
    assert below is not None and below <= 0


def test_the_first_losses_have_no_score() -> None:
    assert spike_score([3.0] * 3, 100.0) is None


def _first_losses(noise: float, seed: int) -> list[float]:
    """Return the first 60 losses of a run with warm-up, with noise relative to the loss."""
    rng = random.Random(seed)
    return [(6.0 + 4.9 * math.exp(-((step / 12) ** 2))) * (1 + rng.gauss(0, noise)) for step in range(60)]


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01, 0.04])
def test_the_first_losses_of_a_normal_run_raise_no_anomaly(noise: float) -> None:
    for seed in range(100):
        run = Run(spike_z=10.0)
        for loss in _first_losses(noise, seed):
            run.step(loss)
        assert run.reported == [], seed


@pytest.mark.parametrize("first", [5, 8, 13, 20, 29])
@pytest.mark.parametrize("rise", [0.05, 0.5])
def test_an_early_divergence_is_found(first: int, rise: float) -> None:
    """The loss falls for a few steps, then rises a little at each step, or at once."""
    normal = _first_losses(0.005, first)[: first - 1]
    run = Run(divergence_steps=10)
    for loss in [*normal, *[normal[-1] * (1 + min(0.5, rise * (1 + number))) for number in range(20)]]:
        run.step(loss)
    assert run.kinds[:2] == ["spike", "divergence"], run.reported
    assert first <= run.reported[0].step <= first + 4


def _norms(count: int, seed: int) -> list[float]:
    """Return norms of gradients like those of a run: first decreasing, with a long tail."""
    rng = random.Random(seed)
    return [(0.4 + 4 * math.exp(-step / 60)) * rng.lognormvariate(0, 0.25) for step in range(count)]


def test_usual_gradient_norms_raise_no_anomaly() -> None:
    for seed in range(5):
        run = Run(grad_spike="skip")
        for norm in _norms(3000, seed):
            run.step(3.0, norm)
        assert run.reported == [] and all(run.applied)


@pytest.mark.parametrize("policy", ["alert", "skip"])
def test_a_spike_of_the_gradient_norm_is_reported_and_its_update_skipped_if_so_set(policy: str) -> None:
    run = Run(grad_spike=policy)
    for norm in [*_norms(200, 1), 30.0, 0.4]:
        run.step(3.0, norm)
    (spike,) = run.reported
    assert (spike.kind, spike.step, spike.batches, spike.policy) == ("grad_spike", 201, (201,), policy)
    assert spike.text.startswith("gradient norm 30 is ")
    assert run.applied == [True] * 200 + [policy == "alert", True]
    assert len(run.state.recent_norms) == 128


def test_a_lasting_rise_of_the_gradient_norm_becomes_usual() -> None:
    run = Run(grad_spike="alert")
    for norm in [*_norms(200, 2), *[5.0] * 200]:
        run.step(3.0, norm)
    assert 10 < len(run.reported) < 128
    assert run.reported[-1].step < 200 + 128


def test_the_first_gradient_norms_and_those_of_a_disabled_guard_are_not_judged() -> None:
    for run, before in ((Run(grad_spike="skip"), 31), (Run(grad_spike="off"), 200)):
        for norm in [*_norms(before, 3), 1000.0]:
            run.step(3.0, norm)
        assert run.reported == [] and all(run.applied)
    assert spike_score([3.0] * 30, 3.01) == pytest.approx(0.01 / 0.006)
