"""Holding out validation pairs: equal images, and equal captions, never lie on both sides.

keep = hold_out(same_side(pictures, captions), wanted=500, seed=0)       # [n] bool, True: validation
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.core.types import UserError

SHARE, MOST = 0.1, 1000
"""Of the pairs, how many are held out: enough for a standard error of 1.6 points."""
FEWEST = 8


def same_side(*keys: Sequence[Sequence[Hashable]]) -> NDArray[np.int64]:
    """[n] int64: samples that share a value of one of their ``keys`` (each [n] lists), or are joined by others that do,
    have one number."""
    count = len(keys[0])
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for column in keys:
        first: dict[Hashable, int] = {}
        for sample, values in enumerate(column):
            for value in values:
                parent[root(sample)] = root(first.setdefault(value, sample))
    return np.array([root(item) for item in range(count)], np.int64)


def hold_out(
    sides: NDArray[np.int64], classes: Sequence[Hashable] | None = None, wanted: int | None = None, seed: int = 0
) -> NDArray[np.bool_]:
    """[n] bool, True on about ``wanted`` samples (null: a tenth, at most 1,000) in whole groups of ``sides``; of each
    of ``classes`` its share, where they are given. Raises UserError where there are too few groups."""
    count = len(sides)
    wanted = min(MOST, round(SHARE * count)) if wanted is None else wanted
    labels = np.zeros(count, np.int64)
    if classes is not None:
        numbers = {value: number for number, value in enumerate(dict.fromkeys(classes))}
        labels = np.array([numbers[value] for value in classes], np.int64)
    missing = wanted * np.bincount(labels) / count
    held = np.zeros(count, bool)
    members = _members(sides)
    for side in np.random.default_rng(seed).permutation(np.unique(sides)).tolist():
        rows = members[side]
        label = labels[rows[0]]
        # A group larger than what is missing would take too much, and of a class something must stay to train on.
        if missing[label] >= 0.5 and len(rows) <= max(1.0, 1.5 * missing[label]):
            held[rows] = True
            missing[label] -= len(rows)
    if held.sum() < min(FEWEST, wanted) or held.all():
        raise UserError(
            f"only {int(held.sum())} of {count:,} pairs can be held out without separating equal images or captions: "
            "give --validation SHARDS, or --for FIELD where captions are the names of classes"
        )
    return held


def _members(sides: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    order = np.argsort(sides, kind="stable")
    values, starts = np.unique(sides[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))
