"""The samples that data.where selects, as an order that stays arithmetic: number among the selected -> sample.

    selection = select(dataset, "clip_score > 0.28")
    selection.size; selection.samples(np.array([0]), np.array([17]))      # the 18th that is selected

A bit per sample and a count per block are kept (1.2 bits a sample), so that each rank and worker finds a selected
sample without a list of them.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format.expression import Expression
from data_tools.format.fields import StoredColumns
from data_tools.format.index import Dataset
from data_tools.io.permutation import Ints
from trainer.core.types import UserError

BLOCK = 512
AT_ONCE = 4096


class Selection:
    """Some of a dataset's samples. Raises UserError if there are none, or a name is not a column."""

    def __init__(self, dataset: Dataset, where: str) -> None:
        condition = Expression(where, "data.where")
        columns = StoredColumns(dataset, condition.names, "data.where")
        bits, counts, rest = [], [0], np.zeros(0, bool)
        for shard in range(dataset.num_shards):
            keep = condition.holds(columns.shard(shard))
            counts.append(int(keep.sum()))
            rest = np.concatenate([rest, keep])
            whole = len(rest) // BLOCK * BLOCK
            bits.append(np.packbits(rest[:whole]))
            rest = rest[whole:]
        bits.append(np.packbits(np.concatenate([rest, np.zeros(-len(rest) % BLOCK, bool)])))
        self.bits = np.concatenate(bits).reshape(-1, BLOCK // 8)
        self.edges = np.cumsum([0, *np.bitwise_count(self.bits).sum(axis=1, dtype=np.int64)], dtype=np.int64)
        self.shard_starts = np.cumsum(counts, dtype=np.int64)
        """[num_shards + 1]: how many are selected before each shard, and at all."""
        self.size = int(self.edges[-1])
        self.digest = xxhash.xxh3_64_hexdigest(self.bits.tobytes())
        if self.size == 0:
            raise UserError(f"data.where: no sample of {dataset.root} meets {where!r}: loosen the condition")

    def starts(self, cycle: int) -> Ints:
        """As Choice.starts."""
        return self.shard_starts

    def samples(self, cycles: Ints, numbers: Ints) -> Ints:
        """As Choice.samples."""
        parts = [self._find(numbers[first : first + AT_ONCE]) for first in range(0, len(numbers), AT_ONCE)]
        return np.concatenate(parts) if parts else numbers

    def _find(self, numbers: Ints) -> Ints:
        blocks = np.searchsorted(self.edges, numbers, side="right") - 1
        bits: NDArray[np.uint8] = np.unpackbits(self.bits[blocks], axis=1)
        before = np.cumsum(bits, axis=1, dtype=np.int32) <= (numbers - self.edges[blocks])[:, None]
        return blocks * BLOCK + before.sum(axis=1)
