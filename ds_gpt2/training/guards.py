"""Detect anomalies of training: spikes, divergence, skipped updates, frozen or drifted weights, repeated data.

The settings (``guards``) determine what happens then: an alert, a skipped update, or a rollback.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_gpt2.common.formatting import counted
from ds_gpt2.config.settings import GuardSettings
from ds_gpt2.engine.train_state import ENOUGH_LOSSES, TrainState
from ds_gpt2.run_dir.journal import Kind

_WINDOW = 100  # recent losses that a new one is compared with
_NORM_WINDOW, _ENOUGH_NORMS = 128, 32  # the same for norms of gradients, at most and at least
_FIRST_LOSSES = 4  # before the first loss that is checked
_SIGMA = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_MIN_SPREAD = 0.002  # relative to the median: with nearly equal losses, a small increase is not a spike
_MIN_EARLY_SPREAD = 0.015  # the same while the losses still fall steeply


@dataclass(frozen=True)
class Anomaly:
    """An anomaly of training."""

    kind: Kind
    step: int
    text: str
    policy: str  # alert, skip or rollback
    first_step: int  # the first step that is affected
    batches: tuple[int, ...] = ()  # of the data, which a rollback excludes


class Guard:
    """Checks each step, with the same result on every rank. Its memory is in ``TrainState`` and survives a resume."""

    def __init__(self, settings: GuardSettings, report: Callable[[Anomaly], None]) -> None:
        """
        Args:
            report: called with every anomaly.
        """
        self._settings = settings
        self._report = report
        self._windows = b""
        self.rollback: Anomaly | None = None  # set once: the run rolls back

    def check_loss(self, state: TrainState, loss: float) -> bool:
        """Check the loss before the update of the next step; return whether the update may be applied."""
        if not math.isfinite(loss):
            if state.high_losses:
                state.high_batches = [*state.high_batches, state.next_batch]
            return False  # reported after the update, like a gradient that is not finite
        z = spike_score(state.recent_losses, loss)
        if z is None or z <= self._settings.spike_z:
            state.recent_losses = [*state.recent_losses, loss][-_WINDOW:]
            state.high_losses, state.high_batches = 0, []
            return True
        state.high_losses += 1
        state.high_batches = [*state.high_batches, state.next_batch]
        step, median = state.step + 1, statistics.median(state.recent_losses)
        text = f"loss {loss:.4f} is {z:.0f} deviations above the recent {median:.4f}"
        if state.high_losses == 1:
            self._handle(Anomaly("spike", step, text, self._settings.spike, step, (state.next_batch,)))
        if state.high_losses == self._settings.divergence_steps:
            first_step, text = step + 1 - state.high_losses, f"{text}, {state.high_losses} in a row"
            first_step -= len(state.high_batches) - state.high_losses  # steps in between whose loss was not finite
            batches = tuple(state.high_batches)
            self._handle(Anomaly("divergence", step, text, self._settings.divergence, first_step, batches))
            # Reported once: later losses are compared with this one.
            state.recent_losses, state.high_losses, state.high_batches = [loss], 0, []
        return self._settings.spike != "skip"

    def check_gradient(self, state: TrainState, norm: float) -> bool:
        """Check the norm of the gradients before the update of the next step; return whether it may be applied.

        Args:
            norm: over all ranks, before clipping; finite.
        """
        recent = state.recent_norms
        state.recent_norms = [*recent, norm][-_NORM_WINDOW:]
        z = robust_score(recent, norm) if len(recent) >= _ENOUGH_NORMS else 0.0
        if z <= self._settings.grad_spike_z:
            return True
        step = state.step + 1
        text = f"gradient norm {norm:.4g} is {z:.0f} deviations above the recent {statistics.median(recent):.4g}"
        self._handle(Anomaly("grad_spike", step, text, self._settings.grad_spike, step, (state.next_batch,)))
        return self._settings.grad_spike != "skip"

    def check_update(self, state: TrainState, loss: float, grad_norm: float, applied: bool, windows: bytes) -> None:
        """Check a step after its update, when ``state`` has counted it.

        Args:
            grad_norm: see ``Update``.
            windows: the step's window numbers, as bytes.
        """
        step, skipped = state.step, state.skipped_in_row
        was_skipped_spike = math.isfinite(loss) and (state.high_losses > 0 or math.isfinite(grad_norm))
        if not applied and not was_skipped_spike:  # which was reported before
            what = "the gradient norm" if math.isfinite(loss) else "the loss"
            self._handle(Anomaly("not_finite", step, f"{what} is Inf or NaN: update skipped", "skip", step))
        if skipped == self._settings.skipped_run_steps:
            batches = _batches_up_to(state.batch, skipped, state.left_out)
            text = f"{skipped} updates in a row were skipped"
            self._handle(Anomaly("skipped_run", step, text, self._settings.skipped_run, step + 1 - skipped, batches))
        if windows == self._windows:
            text = "the data does not advance: the same windows as at the step before"
            self._handle(Anomaly("stuck_data", step, text, self._settings.stuck_data, step))
        self._windows = windows

    def check_weights(self, state: TrainState, fingerprints: Sequence[str]) -> None:
        """Check the weights before a save, by the fingerprints of all ranks."""
        if len(set(fingerprints)) > 1:
            most_common = statistics.mode(fingerprints)
            differing = [str(rank) for rank, each in enumerate(fingerprints) if each != most_common]
            ranks = f"ranks {', '.join(differing)} differ" if len(differing) > 1 else f"rank {differing[0]} differs"
            text = f"the weights differ between ranks ({ranks})"
            self._handle(Anomaly("drift", state.step, text, self._settings.drift, state.step))
        elif fingerprints[0] == state.weights and state.updates > state.weights_updates:
            text = f"{counted(state.updates - state.weights_updates, 'update')} without a change of any weight"
            self._handle(Anomaly("frozen", state.step, text, self._settings.frozen, state.step))
        state.weights, state.weights_updates = fingerprints[0], state.updates

    def is_healthy_end(self, state: TrainState) -> bool:
        """Return whether a run may end in ``state``: updates were applied, and the last ones were not all skipped."""
        return state.step == 0 or (state.updates > 0 and state.skipped_in_row < self._settings.skipped_run_steps)

    def _handle(self, anomaly: Anomaly) -> None:
        if anomaly.policy == "off":
            return
        self._report(anomaly)
        if anomaly.policy == "rollback":
            self.rollback = self.rollback or anomaly


def spike_score(recent: Sequence[float], loss: float) -> float | None:
    """Return by how many robust standard deviations ``loss`` exceeds the usual loss after ``recent``; None if too few.

    The first losses of a run fall steeply, so that their spread says little: until the window is full, a loss is also
    compared with the lowest.
    """
    if len(recent) < _FIRST_LOSSES:
        return None
    usual = robust_score(recent, loss) if len(recent) >= ENOUGH_LOSSES else -math.inf
    return max(usual, _early_score(recent, loss)) if len(recent) < _WINDOW else usual


def _early_score(recent: Sequence[float], loss: float) -> float:
    lowest = min(recent)
    least = _MIN_EARLY_SPREAD * (1 + _FIRST_LOSSES / len(recent)) * abs(lowest)  # few losses show little of the noise
    return (loss - lowest) / max(_noise_of_a_trend(recent), least, 1e-12)


def robust_score(recent: Sequence[float], value: float) -> float:
    """Return by how many standard deviations, from the median absolute deviation, ``value`` exceeds the median."""
    middle = statistics.median(recent)
    deviation = statistics.median(abs(each - middle) for each in recent)
    return (value - middle) / max(_SIGMA * deviation, _MIN_SPREAD * abs(middle), 1e-12)


def _noise_of_a_trend(values: Sequence[float]) -> float:
    """Return the standard deviation of the noise of values that follow a smooth curve, from their second differences.

    The second difference of independent noise has 1 + 4 + 1 times its variance.
    """
    second = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    middle = statistics.median(second)
    return _SIGMA * statistics.median(abs(each - middle) for each in second) / math.sqrt(6)


def _batches_up_to(last: int, count: int, left_out: Sequence[int]) -> tuple[int, ...]:
    """Return the ``count`` batches up to ``last`` that were trained on, ascending."""
    found: list[int] = []
    while len(found) < count and last > 0:
        if last not in left_out:
            found.insert(0, last)
        last -= 1
    return tuple(found)
