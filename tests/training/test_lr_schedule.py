import itertools
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import check_schedule, decay_steps_of
from ds_gpt2.config.interval import Every
from ds_gpt2.config.sections import ScheduleSettings
from ds_gpt2.training.lr_change import describe_change
from ds_gpt2.training.lr_schedule import LearningRate

MISSION = LearningRate(ScheduleSettings(steps=95_365), 95_365)
HIGH, LOW, WARMUP, STEPS = 1.0, 0.1, 30, 300


def rate_of(**values: object) -> LearningRate:
    given = {"steps": STEPS, "warmup_steps": WARMUP, "max_lr": HIGH, "min_lr": LOW, **values}
    schedule = ScheduleSettings.model_validate(given)
    assert schedule.steps is not None
    check_schedule(schedule, schedule.steps)
    return LearningRate(schedule, schedule.steps)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 6e-4 / 715),
        (715, 6e-4),
        (716, 6e-4),
        (715 + (95_365 - 715) // 2 + 1, (6e-4 + 6e-5) / 2),
        (95_366, 6e-5),
        (200_000, 6e-5),
    ],
)
def test_the_learning_rate_matches_the_published_recipe(step: int, expected: float) -> None:
    assert MISSION(step) == pytest.approx(expected, rel=1e-12)


def published(shape: str, decay_shape: str, decay_steps: int) -> Callable[[int], float]:
    """Return the formulas as their authors print them, for an update ``n`` counted from 0."""

    def linear(n: int) -> float:  # of n updates, 1 - n / N
        return LOW + (HIGH - LOW) * (STEPS - n) / (STEPS - WARMUP)

    def cosine(n: int) -> float:  # Loshchilov and Hutter 2017, equation 5
        return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * (n - WARMUP) / (STEPS - WARMUP))) / 2

    def wsd(n: int) -> float:  # Haegele et al. 2024, equation 1, with f as in their section 3
        if n < STEPS - decay_steps:
            return HIGH
        part = (n - (STEPS - decay_steps)) / decay_steps
        f = {"linear": 1 - part, "sqrt": 1 - part**0.5, "cosine": (1 + math.cos(math.pi * part)) / 2}[decay_shape]
        return LOW + f * (HIGH - LOW)

    return {"linear": linear, "cosine": cosine, "wsd": wsd, "constant": lambda n: HIGH}[shape]


@pytest.mark.parametrize(
    ("values", "decay_steps"),
    [
        ({"shape": "cosine"}, 270),
        ({"shape": "linear"}, 270),
        ({"shape": "constant"}, 0),
        ({"shape": "wsd"}, 30),
        ({"shape": "wsd", "decay_fraction": 0.2}, 60),
        ({"shape": "wsd", "decay_steps": 75, "decay_shape": "sqrt"}, 75),
        ({"shape": "wsd", "decay_steps": 270, "decay_shape": "cosine"}, 270),
    ],
)
def test_each_shape_equals_its_published_formula(values: dict[str, object], decay_steps: int) -> None:
    rate = rate_of(**values)
    assert decay_steps_of(rate.schedule, STEPS) == decay_steps
    formula = published(str(values["shape"]), str(values.get("decay_shape", "linear")), decay_steps)
    for step in range(1, STEPS + 1):
        expected = HIGH * step / WARMUP if step <= WARMUP else formula(step - 1)
        assert rate(step) == pytest.approx(expected, rel=1e-12), step


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(2, 400),
    st.floats(0.0, 0.5),
    st.floats(0.01, 0.5),
)
def test_a_rate_rises_during_the_warm_up_and_never_afterwards(
    shape: str, steps: int, warmup: float, decay: float
) -> None:
    wsd = {"decay_fraction": decay, "decay_shape": "sqrt"} if shape == "wsd" else {}
    warmup_steps = int(warmup * steps)
    rate = rate_of(steps=steps, warmup_steps=warmup_steps, shape=shape, **wsd)
    curve = [rate(step) for step in range(1, steps + 5)]
    assert curve[:warmup_steps] == sorted(curve[:warmup_steps])
    assert curve[warmup_steps:] == sorted(curve[warmup_steps:], reverse=True)
    assert all(0 < value <= HIGH for value in curve)
    assert curve[-1] == (HIGH if shape == "constant" else LOW)


def test_the_learning_rate_rises_then_falls_without_a_jump() -> None:
    curve = [rate_of()(step) for step in range(1, STEPS + 11)]
    assert max(abs(a - b) for a, b in itertools.pairwise(curve)) <= 1 / WARMUP + 1e-12


def test_without_warm_up_the_first_step_uses_the_maximum() -> None:
    assert rate_of(steps=10, warmup_steps=0)(1) == HIGH


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"decay_steps": 10},
            "schedule.decay_steps is for schedule.shape=wsd; with cosine set schedule.decay_steps=null",
        ),
        ({"shape": "constant", "decay_shape": "sqrt"}, "schedule.decay_shape is for schedule.shape=wsd"),
        ({"shape": "wsd", "decay_steps": 9, "decay_fraction": 0.1}, "schedule.decay_steps or schedule.decay_fraction"),
        ({"shape": "wsd", "decay_fraction": 1.5}, "decay_fraction"),
        ({"shape": "step"}, "'cosine', 'linear', 'wsd' or 'constant'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ScheduleSettings.model_validate({"steps": STEPS, "warmup_steps": WARMUP, **values})


def test_a_decay_that_does_not_fit_beside_the_warm_up_is_refused() -> None:
    with pytest.raises(
        UserError, match="warmup_steps 30 and a decay of 280 steps are more than the 300 steps of the run"
    ):
        rate_of(shape="wsd", decay_steps=280)


def test_the_change_of_the_rate_is_described_with_both_curves() -> None:
    before, now = rate_of(), rate_of(steps=600)
    first, *plot = describe_change(before, now, 300)
    assert first == (
        "learning rate: 0.1 at step 300; now 0.587 at step 301 (the run ended at step 300) and 0.1 at the last step,"
        " 600 (was 0.1 at step 300)"
    )
    assert len(plot) == 10 and all(len(line) <= 80 and line.isascii() for line in plot)
    assert any("." in line for line in plot[:8]) and any("+" in line for line in plot[:8])
    assert plot[8].index("^") == 10 + 32 and plot[9].endswith("^ resumes here; . before, + now, * both")


def test_nothing_is_described_if_no_update_to_come_changes() -> None:
    assert describe_change(rate_of(), rate_of(), 100) == []
    assert describe_change(rate_of(), rate_of(warmup_steps=20, shape="constant"), STEPS) == []
    late = rate_of(shape="wsd", decay_steps=50), rate_of(shape="wsd", decay_steps=50, warmup_steps=10)
    assert describe_change(*late, 40) == []


def test_every_counts_multiples_and_the_last_step() -> None:
    assert [step for step in range(1, 11) if Every(4).due(step, 10)] == [4, 8, 10]
    assert not any(Every(0).due(step, 10) for step in range(1, 11))
