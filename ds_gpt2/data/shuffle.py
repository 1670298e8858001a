"""The order of training windows: a keyed permutation computed one index at a time.

A Feistel network over the smallest even number of bits that covers the windows, with cycle walking for values out of
range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It needs no memory and computes any position
directly. Unlike a library's shuffle, it does not change with the version of a library, so a run that is resumed under
another numpy still reads every window exactly once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment: 2**64 divided by the golden ratio, made odd


def permute(indices: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the window at each of the positions ``indices`` (n,) in the order of ``epoch``, (n,) int64.

    For each seed and epoch it is a bijection of [0, size).

    Args:
        indices: in [0, size).
        size: number of windows, at least 1.
        seed: at least 0, below 2**64.
        epoch: at least 0.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, epoch)
    values = _feistel(indices.astype(np.uint64), half, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    start = _mix(np.array([seed], np.uint64)) + np.array([epoch + 1], np.uint64) * _GOLDEN
    return _mix(start + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
