"""The order of the windows of several sources in given shares: a pure function of the seed and the position.

Within a stage the sources follow a pattern of ``PERIOD`` windows, so that each source has its exact share of any
``PERIOD`` windows in a row. Within a source the windows are in shuffled order, each once per epoch of that source.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ds_gpt2.config.sections import MIXTURE_PERIOD as PERIOD
from ds_gpt2.data.shuffle import permute

_GOLDEN = 0x9E3779B97F4A7C15  # see ``shuffle``: distinct seeds for the sources

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """The shares of the sources from one position on."""

    first: int  # position of its first window
    shares: tuple[int, ...]  # windows of each source in ``PERIOD`` windows


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the windows of each source in ``PERIOD``, proportional to ``weights``, by the largest remainders.

    Args:
        weights: at least 0, one above 0.
    """
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) * PERIOD / total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (shares[source] - exact[source], source))
    for source in by_remainder[: PERIOD - sum(shares)]:
        shares[source] += 1
    return tuple(shares)


@functools.cache
def pattern_of(shares: tuple[int, ...]) -> Array:
    """Return the source of each of ``PERIOD`` windows, (PERIOD,) int64, evenly spread. Do not modify it: it is cached.

    Of the first n windows, source i has n * share / PERIOD, rounded up or down (Tijdeman 1980, "The chairman assignment
    problem": of the sources that are due, the one whose next window has the earliest deadline).

    Args:
        shares: see ``shares_of``; their sum is ``PERIOD``.
    """
    sources = [source for source, share in enumerate(shares) if share]
    if len(sources) == 1:
        return np.full(PERIOD, sources[0], np.int64)
    scale = 2 * len(sources) - 2  # 1 - 1 / scale is the largest difference that the method allows
    counts = dict.fromkeys(sources, 0)
    pattern = np.empty(PERIOD, np.int64)
    for position in range(PERIOD):
        # What is due of each source and not taken, in parts of 1 / (PERIOD * scale) of a window.
        behind = {each: scale * ((position + 1) * shares[each] - PERIOD * counts[each]) for each in sources}
        due = [source for source in sources if behind[source] >= PERIOD]
        chosen = min(due, key=lambda source: (((scale - 1) * PERIOD - behind[source]) / shares[source], source))
        counts[chosen] += 1
        pattern[position] = chosen
    return pattern


class Mixture:
    """Which window of which source is at each position."""

    def __init__(self, windows: Sequence[int], stages: Sequence[Stage], seed: int, names: Sequence[str] = ()) -> None:
        """
        Args:
            windows: of each source, at least 1.
            stages: by ascending position, the first at 0.
            names: of the sources; empty for a single dataset.
        """
        self.names = tuple(names)
        self._windows = np.array(windows, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._windows)[:-1]])  # of each source in the numbers of windows
        self._stages = tuple(stages)
        self._seeds = [(seed + source * _GOLDEN) % 2**64 for source in range(len(windows))]
        self._firsts = np.array([stage.first for stage in stages], np.int64)
        self._patterns = np.stack([pattern_of(stage.shares) for stage in stages])  # (stages, PERIOD)
        taken = self._patterns[:, :, None] == np.arange(len(windows))  # (stages, PERIOD, sources)
        before = np.cumsum(taken, axis=1, dtype=np.int64) - taken  # in the pattern, before each of its positions
        self._before = np.moveaxis(before, 2, 0)  # (sources, stages, PERIOD)
        self._shares = np.array([stage.shares for stage in stages], np.int64)  # (stages, sources)
        self._begun = np.zeros_like(self._shares)  # windows of each source before each stage
        for number in range(1, len(stages)):
            length = int(self._firsts[number] - self._firsts[number - 1])
            self._begun[number] = self._begun[number - 1] + self._taken(number - 1, length)

    @classmethod
    def of_one(cls, windows: int, seed: int) -> Mixture:
        """Return the order of a single dataset."""
        return cls([windows], [Stage(0, (PERIOD,))], seed)

    def __len__(self) -> int:
        """Return the number of windows of all sources."""
        return int(self._windows.sum())

    def windows_at(self, positions: Array) -> Array:
        """Return the windows at ``positions`` (n,), (n,) int64, numbered through all sources."""
        stages = np.searchsorted(self._firsts, positions, side="right") - 1
        periods, within = np.divmod(positions - self._firsts[stages], PERIOD)
        sources = self._patterns[stages, within]
        used = self._begun[stages, sources] + periods * self._shares[stages, sources]
        used += self._before[sources, stages, within]
        found = np.empty(len(positions), np.int64)
        epochs, offsets = np.divmod(used, self._windows[sources])
        order = np.lexsort((epochs, sources))
        bounds = np.flatnonzero(np.diff(sources[order]) | np.diff(epochs[order])) + 1
        for chosen in np.split(order, bounds):  # the positions with the same source and epoch
            source, epoch = int(sources[chosen[0]]), int(epochs[chosen[0]])
            shuffled = permute(offsets[chosen], int(self._windows[source]), self._seeds[source], epoch)
            found[chosen] = self._starts[source] + shuffled
        return found

    def used_before(self, position: int) -> Array:
        """Return the number of windows of each source before ``position``, (sources,) int64, repetitions included."""
        stage = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return self._begun[stage] + self._taken(stage, position - int(self._firsts[stage]))

    def epochs_before(self, position: int) -> npt.NDArray[np.float64]:
        """Return the passes over each source before ``position``, (sources,) fp64."""
        return self.used_before(position) / self._windows

    def _taken(self, stage: int, length: int) -> Array:
        """Return the number of windows of each source in the first ``length`` windows of a stage, (sources,) int64."""
        periods, rest = divmod(length, PERIOD)
        in_rest = np.bincount(self._patterns[stage, :rest], minlength=len(self._windows)).astype(np.int64)
        return periods * self._shares[stage] + in_rest
