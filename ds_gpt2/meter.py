"""How fast training goes and when it will be done."""

from __future__ import annotations

import time

_MEMORY = 0.95  # of the running mean of a step's wall time


class Meter:
    """Times steps. Training time is a step alone; the ETA counts evaluation and saving too."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None) -> None:
        """
        Args:
            peak_flops: of all devices together, None where not known.
        """
        self._tokens = tokens_per_step
        self._flops = flops_per_token
        self._peak = peak_flops
        self._begun = self._previous_begin = 0.0
        self._mean: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._previous_begin, self._begun = self._begun, time.monotonic()

    def end(self) -> dict[str, float]:
        """The step is done, and the device with it: ``perf/*`` of it."""
        seconds = time.monotonic() - self._begun
        self._remember(self._begun - self._previous_begin if self._previous_begin else seconds)
        rate = self._tokens / seconds
        measured = {"perf/step_ms": 1000 * seconds, "perf/tokens_per_s": rate}
        if self._peak is not None:
            measured["perf/mfu"] = rate * self._flops / self._peak
        return measured

    def eta(self, steps_left: int) -> float:
        """Seconds until the run is done."""
        return steps_left * (self._mean or 0.0)

    def _remember(self, seconds: float) -> None:
        self._mean = seconds if self._mean is None else _MEMORY * self._mean + (1 - _MEMORY) * seconds
