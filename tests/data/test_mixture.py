"""The order of a mixture: exact shares, no window twice before its source is through, any position on its own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gpt2.config.sections import MIXTURE_PERIOD as PERIOD
from ds_gpt2.data.mixture import Mixture, Stage, pattern_of, shares_of

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


def sources_of(numbers: np.ndarray, windows: list[int]) -> np.ndarray:
    """Return the source of each window."""
    return np.searchsorted(np.cumsum(windows), numbers, side="right")


@given(WEIGHTS)
def test_shares_are_whole_windows_that_differ_from_the_weights_by_less_than_one(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == PERIOD
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - PERIOD * weight / sum(weights)) < 1 + 1e-9


def test_decimal_weights_have_exact_shares() -> None:
    assert shares_of([0.7, 0.3]) == (700, 300)
    assert shares_of([7, 2, 1]) == (700, 200, 100)
    assert shares_of([1, 1, 1]) == (334, 333, 333)


@given(WEIGHTS)
def test_a_pattern_is_evenly_spread(weights: list[float]) -> None:
    """Of the first n windows every source has its share to within one window, so of any batch to within two."""
    shares = shares_of(weights)
    counts = np.cumsum(pattern_of(shares)[:, None] == np.arange(len(shares)), axis=0)
    due = np.arange(1, PERIOD + 1)[:, None] * np.array(shares) / PERIOD
    assert np.abs(counts - due).max() < 1
    assert counts[-1].tolist() == list(shares)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[int], list[Stage], int]:
    windows = draw(st.lists(st.integers(30, 3000), min_size=1, max_size=4))
    firsts = sorted({0, *draw(st.lists(st.integers(1, 6000), max_size=2))})
    weights = st.lists(st.floats(0, 1), min_size=len(windows), max_size=len(windows)).filter(
        lambda found: sum(found) > 0.1
    )
    return windows, [Stage(first, shares_of(draw(weights))) for first in firsts], draw(st.integers(0, 2**32))


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.integers(0, 5000))
def test_any_thousand_windows_of_a_stage_have_the_exact_shares(
    mixture: tuple[list[int], list[Stage], int], offset: int
) -> None:
    windows, stages, _ = mixture
    first = stages[-1].first + offset
    found = sources_of(Mixture(*mixture).windows_at(np.arange(first, first + PERIOD)), windows)
    assert np.bincount(found, minlength=len(windows)).tolist() == list(stages[-1].shares)


@settings(max_examples=30, deadline=None)
@given(mixtures())
def test_no_window_is_repeated_before_its_source_is_through(mixture: tuple[list[int], list[Stage], int]) -> None:
    windows, _, _ = mixture
    numbers = Mixture(*mixture).windows_at(np.arange(9000))
    found = sources_of(numbers, windows)
    for source, count in enumerate(windows):
        own = numbers[found == source]
        for start in range(0, len(own), count):
            epoch = own[start : start + count]
            assert len(set(epoch.tolist())) == len(epoch)


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.lists(st.integers(0, 8999), min_size=1, max_size=50), st.integers(1, 9000))
def test_any_position_is_computed_directly(
    mixture: tuple[list[int], list[Stage], int], positions: list[int], end: int
) -> None:
    whole = Mixture(*mixture).windows_at(np.arange(9000))
    assert Mixture(*mixture).windows_at(np.array(positions)).tolist() == whole[positions].tolist()
    windows = mixture[0]
    used = np.bincount(sources_of(whole[:end], windows), minlength=len(windows))
    assert Mixture(*mixture).used_before(end).tolist() == used.tolist()
    assert Mixture(*mixture).epochs_before(end) == pytest.approx(used / np.array(windows))


def test_a_later_stage_continues_each_source_where_it_was() -> None:
    """A stage that is added later changes nothing before it."""
    windows, seed = [500, 4000], 3
    alone = Mixture(windows, [Stage(0, (500, 500))], seed).windows_at(np.arange(1500))
    both = Mixture(windows, [Stage(0, (500, 500)), Stage(1500, (0, 1000))], seed).windows_at(np.arange(4750))
    assert both[:1500].tolist() == alone.tolist()
    second = both[1500:]
    assert (second >= 500).all() and Counter(both[both >= 500].tolist()).most_common(1)[0][1] == 1


def test_sources_of_equal_length_are_shuffled_differently() -> None:
    numbers = Mixture([1000, 1000], [Stage(0, (500, 500))], 7).windows_at(np.arange(2000))
    first, second = numbers[numbers < 1000], numbers[numbers >= 1000] - 1000
    assert (first == second).mean() < 0.02
