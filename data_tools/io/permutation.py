"""Keyed permutations of ``range(size)``: any part is computed on demand, without storing or sorting anything.

    shuffle = Permutation(size=1_000_000_000, key=7)
    shuffle(np.arange(4096))                              # the first 4096 of the permuted order

A Feistel network over the next power of two, applied until the result is inside the range (cycle walking: Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). It uses integer arithmetic only, so no library release
changes an order. The order of samples in training and in shards depends on it: a change breaks runs that resume, and
changes the bytes of shards (then raise ``LAYOUT`` in data_tools/sharding/plan.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 6  # even, so that halves of unequal width are back in their places at the end


def scramble(words: Words) -> Words:
    """The finaliser of SplitMix64: neighbouring inputs give unrelated outputs. uint64 of any shape."""
    words = words ^ (words >> np.uint64(30))
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    words = words ^ (words >> np.uint64(27))
    words = words * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Permutation:
    """A keyed permutation of ``range(size)``. ``size`` is at least 1; ``key`` is any integer, taken modulo 2**64."""

    def __init__(self, size: int, key: int):
        assert size > 0
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self.widths = (bits // 2, bits - bits // 2)
        offsets = np.arange(ROUNDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.keys = scramble(offsets + np.uint64(key % 2**64))

    def __call__(self, positions: Ints) -> Ints:
        """Positions [n] int64 in [0, size) -> their images [n] int64 in [0, size)."""
        words = self._cipher(positions.astype(np.uint64))
        outside = np.flatnonzero(words >= self.size)
        while outside.size:  # the cipher's domain is a power of two below 2 * size: walk its cycle until inside
            words[outside] = self._cipher(words[outside])
            outside = outside[words[outside] >= self.size]
        return words.astype(np.int64)

    def _cipher(self, words: Words) -> Words:
        left_bits, right_bits = (np.uint64(width) for width in self.widths)
        left, right = words >> right_bits, words & ((np.uint64(1) << right_bits) - np.uint64(1))
        for key in self.keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ (mixed >> (np.uint64(64) - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right
