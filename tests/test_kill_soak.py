"""A short soak in the suite; the long one is benchmarks/kill_soak.py with its committed result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.kill_soak import differences, soak


def test_a_run_survives_ten_kills_and_becomes_what_it_would_have_been(tmp_path: Path) -> None:
    tally = soak(kills=10, ranks=2, seed=7, folder=tmp_path)
    assert tally.failures == []
    assert tally.sigkills >= 10
    assert tally.runs >= 1
    assert tally.verified > 20


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": [1, torch.ones(2)]}, {"a": [1, torch.ones(2)]}, []),
        ({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 1e-38])}, ["x.a differs"]),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.bfloat16)}, ["x.a differs"]),
        ({"a": 1.0}, {"a": 1.0000000000000002}, ["x.a: 1.0 is not 1.0000000000000002"]),
        ({"a": [1]}, {"a": [1, 2]}, ["x.a: list is not list of the same length"]),
        ({"a": 1}, {"b": 1}, ["x has other keys"]),
    ],
)
def test_the_comparison_sees_what_differs(one: object, other: object, expected: list[str]) -> None:
    assert differences(one, other, "x") == expected
