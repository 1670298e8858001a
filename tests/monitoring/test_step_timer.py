import time
from collections.abc import Iterator
from typing import Any

import pytest

from ds_gpt2.monitoring.pace import Cadence, Pace, timed_of
from ds_gpt2.monitoring.step_timer import EarlierTime, StepTimer

_PHASES = [f"perf/{name}_ms" for name in ("data", "forward_backward", "update", "eval", "save", "step")]
NEVER = Cadence({}, 0)


def earlier(trained_seconds: float = 0.0, first_start: float = 0.0, cadence: Cadence = NEVER) -> EarlierTime:
    return EarlierTime(trained_seconds, first_start, Pace(cadence, [0]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_throughput_excludes_evaluation_and_saving(clock: list[float]) -> None:
    timed = StepTimer(tokens_per_step=1000, flops_per_token=2e9, peak_flops=4e12, earlier=earlier())
    timed.begin()
    clock[0] += 0.5
    measured = timed.end(1)
    expected = {"perf/step_ms": 500.0, "perf/tokens_per_s": 2000.0, "perf/mfu": 1.0, "perf/data_ms": 0.0}
    assert {tag: measured[tag] for tag in expected} == expected


def test_the_time_of_a_step_is_reported_by_phase(clock: list[float]) -> None:
    def slow(items: list[int]) -> Iterator[int]:
        for item in items:
            clock[0] += 0.25
            yield item

    timed = StepTimer(1000, 2e9, None, earlier(trained_seconds=30.0, first_start=60.0))
    timed.begin()
    for _ in timed.waiting_for(slow([1, 2])):
        clock[0] += 0.75
    timed.mark("forward_backward")
    clock[0] += 5
    timed.mark("eval")  # observing gradients is not training
    clock[0] += 2
    timed.mark("update")
    measured = timed.end(1)
    assert {tag: measured.get(tag) for tag in _PHASES} == {
        "perf/data_ms": 500, "perf/forward_backward_ms": 2000, "perf/update_ms": 2000,
        "perf/eval_ms": None, "perf/save_ms": None, "perf/step_ms": 4000,
    }  # fmt: skip
    assert measured["perf/goodput"] == (30 + 4) / (109 - 60)
    clock[0] += 3
    timed.mark("eval")
    clock[0] += 7
    timed.mark("save")
    timed.begin()
    clock[0] += 1
    measured = timed.end(2)
    assert {tag: measured.get(tag) for tag in _PHASES} == {
        "perf/data_ms": 0, "perf/forward_backward_ms": None, "perf/update_ms": None,
        "perf/eval_ms": 8000, "perf/save_ms": 7000, "perf/step_ms": 1000,
    }  # fmt: skip


def test_without_a_peak_there_is_no_mfu(clock: list[float]) -> None:
    timed = StepTimer(1000, 2e9, None, earlier())
    timed.begin()
    clock[0] += 1
    assert "perf/mfu" not in timed.end(1)


def test_the_eta_counts_steps_evaluations_and_saves_separately(clock: list[float]) -> None:
    """Steps take 1 s, an evaluation every 10 steps 30 s, a save every 20 steps 4 s; the ETA jumps after neither."""
    timed = StepTimer(1000, 2e9, None, earlier(cadence=Cadence({"validation": 10}, 20)))
    assert timed.eta(0, 100) == 0
    estimates, records = [], []
    for step in range(1, 61):
        timed.begin()
        clock[0] += 1
        records.append({"step": step, **timed.end(step)})
        estimates.append(timed.eta(step, 100))
        if step % 10 == 0:
            clock[0] += 30
            timed.mark("eval")
        if step % 20 == 0:
            clock[0] += 4
            timed.mark("save")
    assert estimates[0] == 99  # no evaluation or save is measured yet
    assert estimates[10] == 89 + 9 * 30
    assert estimates[20] == 79 + 8 * 30 + 4 * 4
    assert estimates[40:50] == [59 - step + 6 * 30 + 3 * 4 for step in range(9)] + [50 + 5 * 30 + 3 * 4]
    assert timed.eta(100, 100) == 0
    recorded = Pace(Cadence({"validation": 10}, 20), [0])  # the estimate of status and report
    for each in timed_of(records):
        recorded.add(each)
    assert recorded.mean_left(60, 100) == pytest.approx(estimates[-1])


class Event:
    """A GPU event at a time in milliseconds, which the device has reached or not."""

    def __init__(self, milliseconds: float, reached: bool = True) -> None:
        self.milliseconds, self.reached = milliseconds, reached

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, later: "Event") -> float:
        return later.milliseconds - self.milliseconds


@pytest.mark.parametrize(("reached", "expected"), [(True, 900.0), (False, 2000.0)])
def test_gpu_phases_are_timed_by_events_without_waiting(clock: list[float], reached: bool, expected: float) -> None:
    events: Any = iter([Event(100), Event(1000, reached)])
    timed = StepTimer(1000, 2e9, None, earlier(), record_event=lambda: next(events))
    timed.begin()
    clock[0] += 2
    timed.mark("forward_backward")
    measured = timed.end(1)
    assert (measured["perf/forward_backward_ms"], measured["perf/step_ms"]) == (expected, 2000.0)
