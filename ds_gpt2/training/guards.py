"""Is the training itself sound? What is not becomes an incident, and the settings say what is done about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_gpt2.config.settings import GuardSettings
from ds_gpt2.engine.train_state import ENOUGH_LOSSES, TrainState
from ds_gpt2.run_dir.journal import Kind

_WINDOW = 100  # losses that a new one is compared with
_SIGMA = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_LEAST_SPREAD = 0.002  # of the median: losses that hardly differ make no small step a spike


@dataclass(frozen=True)
class Anomaly:
    """Something is wrong with the training."""

    kind: Kind
    step: int
    text: str
    policy: str  # alert, skip or rollback
    begun: int  # the first step that is not to be trusted
    batches: tuple[int, ...] = ()  # of the data that it came with: a rollback leaves them out


class Guard:
    """Judges each step, on every rank alike; what it remembers is in ``TrainState``, so a resume changes nothing."""

    def __init__(self, settings: GuardSettings, tell: Callable[[Anomaly], None]) -> None:
        """
        Args:
            tell: is given every incident.
        """
        self._settings = settings
        self._tell = tell
        self._windows = b""
        self.rollback: Anomaly | None = None  # once set, the run is to go back

    def judge_loss(self, state: TrainState, loss: float) -> bool:
        """Before the update of the step after ``state``, whose mean loss is ``loss``: whether it may be made."""
        if not math.isfinite(loss):
            if state.high_losses:
                state.high_batches = [*state.high_batches, state.next_batch]
            return False  # told after the update, like a gradient that is not finite
        z = spike_score(state.recent_losses, loss)
        if z is None or z <= self._settings.spike_z:
            state.recent_losses = [*state.recent_losses, loss][-_WINDOW:]
            state.high_losses, state.high_batches = 0, []
            return True
        state.high_losses += 1
        state.high_batches = [*state.high_batches, state.next_batch]
        step, usual = state.step + 1, statistics.median(state.recent_losses)
        text = f"loss {loss:.4f} is {z:.0f} deviations above the recent {usual:.4f}"
        if state.high_losses == 1:
            self._raise(Anomaly("spike", step, text, self._settings.spike, step, (state.next_batch,)))
        if state.high_losses == self._settings.divergence_steps:
            begun, text = step + 1 - state.high_losses, f"{text}, the {state.high_losses}th in a row"
            begun -= len(state.high_batches) - state.high_losses  # steps in between whose loss was not finite
            batches = tuple(state.high_batches)
            self._raise(Anomaly("divergence", step, text, self._settings.divergence, begun, batches))
            # Told once: from here on this is its level.
            state.recent_losses, state.high_losses, state.high_batches = [loss], 0, []
        return self._settings.spike != "skip"

    def judge_update(self, state: TrainState, loss: float, applied: bool, windows: bytes) -> None:
        """After a step, which ``state`` has counted, from ``windows`` of the data."""
        step, skipped = state.step, state.skipped_in_row
        if not applied and not (math.isfinite(loss) and state.high_losses):  # a spike that is skipped has been told
            what = "a gradient" if math.isfinite(loss) else "the loss"
            self._raise(Anomaly("not_finite", step, f"{what} is Inf or NaN: update skipped", "skip", step))
        if skipped == self._settings.skipped_run_steps:
            batches = _batches_up_to(state.batch, skipped, state.left_out)
            text = f"{skipped} updates in a row were skipped"
            self._raise(Anomaly("skipped_run", step, text, self._settings.skipped_run, step + 1 - skipped, batches))
        if windows == self._windows:
            text = "the data does not advance: the same windows as at the step before"
            self._raise(Anomaly("stuck_data", step, text, self._settings.stuck_data, step))
        self._windows = windows

    def judge_weights(self, state: TrainState, fingerprints: Sequence[str]) -> None:
        """Before a save, by the fingerprints of all ranks' weights."""
        if len(set(fingerprints)) > 1:
            usual = statistics.mode(fingerprints)
            odd = ", ".join(str(rank) for rank, each in enumerate(fingerprints) if each != usual)
            text = f"the ranks' weights have drifted apart (rank {odd} differs)"
            self._raise(Anomaly("drift", state.step, text, self._settings.drift, state.step))
        elif fingerprints[0] == state.weights and state.updates > state.weights_updates:
            text = f"{state.updates - state.weights_updates} updates have not changed a single weight"
            self._raise(Anomaly("frozen", state.step, text, self._settings.frozen, state.step))
        state.weights, state.weights_updates = fingerprints[0], state.updates

    def is_sound(self, state: TrainState) -> bool:
        """At the end: whether updates were made, and not skipped for as long as a rollback would wait."""
        return state.step == 0 or (state.updates > 0 and state.skipped_in_row < self._settings.skipped_run_steps)

    def _raise(self, incident: Anomaly) -> None:
        if incident.policy == "off":
            return
        self._tell(incident)
        if incident.policy == "rollback":
            self.rollback = self.rollback or incident


def spike_score(recent: Sequence[float], loss: float) -> float | None:
    """How many robust standard deviations ``loss`` lies above the median of ``recent``; None while they are too few."""
    if len(recent) < ENOUGH_LOSSES:
        return None
    middle = statistics.median(recent)
    deviation = statistics.median(abs(each - middle) for each in recent)
    return (loss - middle) / max(_SIGMA * deviation, _LEAST_SPREAD * abs(middle), 1e-12)


def _batches_up_to(last: int, count: int, left_out: Sequence[int]) -> tuple[int, ...]:
    """The ``count`` batches up to ``last`` that were trained on, ascending."""
    found: list[int] = []
    while len(found) < count and last > 0:
        if last not in left_out:
            found.insert(0, last)
        last -= 1
    return tuple(found)
