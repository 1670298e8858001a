"""Time of a step and its phases, throughput, MFU, goodput, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from ds_gpt2.monitoring.pace import Pace, Timed

T = TypeVar("T")

_MIN_SECONDS = 1e-4  # shorter evaluations and saves are not reported


@dataclass(frozen=True)
class EarlierTime:
    """The time that the run has taken before this process started."""

    trained_seconds: float  # of recorded steps, without evaluation and saving
    first_start: float  # seconds since 1970
    pace: Pace  # of the recorded steps


class StepTimer:
    """Times steps and their phases. A step's time excludes evaluation and saving; the time left includes them.

    Nothing here waits for the device: on a GPU, phases are timed by events on its stream, which are read when the
    loop has waited for the step anyway.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        earlier: EarlierTime,
        record_event: Callable[[], torch.cuda.Event | None] = lambda: None,
    ) -> None:
        """
        Args:
            flops_per_token: floating-point operations of forward and backward pass.
            peak_flops: of all devices together; None if not known.
            record_event: records an event with timing on the device; returns None on a CPU, where calls block.
        """
        self._tokens = tokens_per_step
        self._flops = flops_per_token
        self._peak = peak_flops
        self._trained = earlier.trained_seconds
        self._first_start = earlier.first_start
        self._pace = earlier.pace
        self._record_event = record_event
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self._waited = self._start = 0.0
        self._between: dict[str, float] = {}  # seconds of evaluation and saving since the last report

    def begin(self) -> None:
        """Start the timer of a step."""
        for phase, (seconds, _) in self._phases():
            self._between[phase] = self._between.get(phase, 0.0) + seconds
        self._start = time.monotonic()
        self._waited = 0.0
        self._marks = [("", self._start, self._record_event())]

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items`` unchanged; the time until each is available counts as ``perf/data_ms``."""
        iterator = iter(items)
        while True:
            start = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - start
            yield item

    def mark(self, phase: str) -> None:
        """End ``phase``, which began at the previous mark."""
        self._marks.append((phase, time.monotonic(), self._record_event()))

    def end(self, step: int) -> dict[str, float]:
        """End ``step``, whose work the device has finished.

        Returns:
            ``perf/*`` of this step, and of evaluation and saving since the step before it.
        """
        now = time.monotonic()
        phases = {phase: on_device for phase, (_, on_device) in self._phases()}
        evaluated = phases.pop("eval", 0.0)
        seconds = now - self._start - evaluated
        self._trained += seconds
        rate = self._tokens / seconds
        measured = {"perf/step_ms": 1000 * seconds, "perf/tokens_per_s": rate, "perf/data_ms": 1000 * self._waited}
        between = {phase: length for phase, length in self._between.items() if length > _MIN_SECONDS}
        measured |= {f"perf/{phase}_ms": 1000 * length for phase, length in (phases | between).items()}
        measured["perf/goodput"] = min(1.0, self._trained / max(time.time() - self._first_start, 1e-9))
        if self._peak is not None:
            measured["perf/mfu"] = rate * self._flops / self._peak
        self._pace.add(Timed(step, seconds, between.get("eval", 0.0), between.get("save", 0.0)))
        self._between = {"eval": evaluated}
        self._marks = [("", now, None)]
        return measured

    def eta(self, step: int, steps: int) -> float:
        """Return the seconds from the end of ``step`` until all ``steps`` are done."""
        return self._pace.mean_left(step, steps) or 0.0

    def _phases(self) -> Iterator[tuple[str, tuple[float, float]]]:
        """Yield each phase since the first mark, with its seconds on the host and on the device."""
        for (_, start, first), (phase, end, last) in zip(self._marks, self._marks[1:], strict=False):
            on_host = on_device = end - start
            if first is not None and last is not None and last.query():
                on_device = first.elapsed_time(last) / 1000
            yield phase, (on_host, on_device)
