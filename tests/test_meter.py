import pytest

from ds_gpt2 import meter
from ds_gpt2.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_of_the_step_alone(clock: list[float]) -> None:
    timed = Meter(tokens_per_step=1000, flops_per_token=2e9, peak_flops=4e12)
    timed.begin()
    clock[0] += 0.5
    assert timed.end() == {"perf/step_ms": 500.0, "perf/tokens_per_s": 2000.0, "perf/mfu": 1.0}


def test_no_peak_no_mfu(clock: list[float]) -> None:
    timed = Meter(1000, 2e9, None)
    timed.begin()
    clock[0] += 1
    assert "perf/mfu" not in timed.end()


def test_the_eta_counts_what_happens_between_steps(clock: list[float]) -> None:
    timed = Meter(1000, 2e9, None)
    assert timed.eta(10) == 0
    for _ in range(300):
        timed.begin()
        clock[0] += 1  # the step
        timed.end()
        clock[0] += 3  # a save, say
    assert timed.eta(10) == pytest.approx(40, rel=0.01)
