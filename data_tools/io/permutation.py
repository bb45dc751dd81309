"""The order of samples as arithmetic: a keyed permutation, any part of which can be asked for without holding the rest.

A Feistel network over the next power of four, walked until it falls inside the range (Black and Rogaway 2002, "Ciphers
with arbitrary finite domains"). It depends on nothing but integers, so that no library's new release changes an order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def permute(positions: NDArray[np.integer], count: int, key: int) -> NDArray[np.int64]:
    """Positions [n] in 0 .. count - 1 -> the numbers in 0 .. count - 1 that stand there, int64 [n]. One-to-one for
    every key."""
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(_mix_int((key + (turn + 1) * _GOLDEN) & _MASK)) for turn in range(_ROUNDS)]
    values = _feistel(np.asarray(positions).astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value], np.uint64))[0])
