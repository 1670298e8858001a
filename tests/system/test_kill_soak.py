"""A short version of benchmarks/kill_soak.py, whose long version has its result in benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill_soak import soak

pytestmark = [pytest.mark.ranks, pytest.mark.extended]


def test_a_run_with_six_kills_has_the_same_result_as_a_run_without(tmp_path: Path) -> None:
    tally = soak(kills=6, ranks=2, seed=7, folder=tmp_path)
    assert tally.failures == []
    assert tally.sigkills >= 6
    assert tally.runs >= 1
    assert tally.verified > 6  # the exact number depends on the timing of saves
