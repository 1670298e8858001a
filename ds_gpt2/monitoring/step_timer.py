"""How fast training goes, where the time of a step goes, and when the run will be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from ds_gpt2.monitoring.pace import Pace, Timed

T = TypeVar("T")

_WORTH_TELLING = 1e-4  # seconds beside a step


@dataclass(frozen=True)
class Past:
    """What the run has behind it when this process starts."""

    trained_seconds: float  # of the steps that count, evaluation and saving left out
    begun: float  # the run's very first start, seconds since 1970
    pace: Pace  # of the steps so far


class Meter:
    """Times steps and their phases. Training time is a step alone; the time left counts evaluation and saving apart.

    Nothing here waits for the device: on a GPU phases lie between events on its stream, read when the loop has waited
    for the step anyway.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        past: Past,
        moment: Callable[[], torch.cuda.Event | None] = lambda: None,
    ) -> None:
        """
        Args:
            peak_flops: of all devices together, None where not known.
            moment: records an event on the device, with timing; None on a CPU, whose work is done when a call returns.
        """
        self._tokens = tokens_per_step
        self._flops = flops_per_token
        self._peak = peak_flops
        self._trained = past.trained_seconds
        self._first_start = past.begun
        self._pace = past.pace
        self._moment = moment
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self._waited = self._begun = 0.0
        self._aside: dict[str, float] = {}  # seconds that went into other things than steps since the last report

    def begin(self) -> None:
        """A step begins."""
        for phase, (seconds, _) in self._phases():
            self._aside[phase] = self._aside.get(phase, 0.0) + seconds
        self._begun = time.monotonic()
        self._waited = 0.0
        self._marks = [("", self._begun, self._moment())]

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """``items`` as they are; the time until each is there counts as ``perf/data_ms``."""
        iterator = iter(items)
        while True:
            begun = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - begun
            yield item

    def mark(self, phase: str) -> None:
        """``phase`` ends here, and began with the mark before."""
        self._marks.append((phase, time.monotonic(), self._moment()))

    def end(self, step: int) -> dict[str, float]:
        """``step`` is done, and the device with it: ``perf/*`` of it, and of what went on beside steps before it."""
        now = time.monotonic()
        phases = {phase: on_device for phase, (_, on_device) in self._phases()}
        evaluated = phases.pop("eval", 0.0)
        seconds = now - self._begun - evaluated
        self._trained += seconds
        rate = self._tokens / seconds
        measured = {"perf/step_ms": 1000 * seconds, "perf/tokens_per_s": rate, "perf/data_ms": 1000 * self._waited}
        aside = {phase: length for phase, length in self._aside.items() if length > _WORTH_TELLING}
        measured |= {f"perf/{phase}_ms": 1000 * length for phase, length in (phases | aside).items()}
        measured["perf/goodput"] = min(1.0, self._trained / max(time.time() - self._first_start, 1e-9))
        if self._peak is not None:
            measured["perf/mfu"] = rate * self._flops / self._peak
        self._pace.add(Timed(step, seconds, aside.get("eval", 0.0), aside.get("save", 0.0)))
        self._aside = {"eval": evaluated}
        self._marks = [("", now, None)]
        return measured

    def eta(self, step: int, steps: int) -> float:
        """Return the seconds from the end of ``step`` until all ``steps`` are done."""
        return self._pace.mean_left(step, steps) or 0.0

    def _phases(self) -> Iterator[tuple[str, tuple[float, float]]]:
        """Each phase since the first mark, and its seconds by the host's clock and, if it has one, by the device's."""
        for (_, begun, first), (phase, ended, last) in zip(self._marks, self._marks[1:], strict=False):
            on_host = on_device = ended - begun
            if first is not None and last is not None and last.query():
                on_device = first.elapsed_time(last) / 1000
            yield phase, (on_host, on_device)
