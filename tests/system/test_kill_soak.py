"""A short soak in the suite; the long one is benchmarks/kill_soak.py with its committed result."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kill_soak import soak


def test_a_run_survives_six_kills_and_becomes_what_it_would_have_been(tmp_path: Path) -> None:
    tally = soak(kills=6, ranks=2, seed=7, folder=tmp_path)
    assert tally.failures == []
    assert tally.sigkills >= 6
    assert tally.runs >= 1
    assert tally.verified > 6  # there was something to look at; how much, depends on how saves fall
