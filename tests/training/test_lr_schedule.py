import itertools
import math
from typing import Any

import pytest

from ds_gpt2.config.interval import Every
from ds_gpt2.training.lr_schedule import learning_rate

MISSION: dict[str, Any] = {"steps": 95_365, "warmup_steps": 715, "max_lr": 6e-4, "min_lr": 6e-5}


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
    assert learning_rate(step, **MISSION) == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_rises_then_falls_without_a_jump() -> None:
    curve = [learning_rate(step, steps=300, warmup_steps=30, max_lr=1.0, min_lr=0.1) for step in range(1, 311)]
    peak = curve.index(max(curve))
    assert curve[: peak + 1] == sorted(curve[: peak + 1])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(curve)) <= 1 / 30 + 1e-12
    assert all(math.isfinite(value) and value > 0 for value in curve)


def test_without_warm_up_the_first_step_uses_the_maximum() -> None:
    assert learning_rate(1, steps=10, warmup_steps=0, max_lr=1.0, min_lr=0.0) == 1.0


def test_every_counts_multiples_and_the_last_step() -> None:
    assert [step for step in range(1, 11) if Every(4).due(step, 10)] == [4, 8, 10]
    assert not any(Every(0).due(step, 10) for step in range(1, 11))
