"""The plan of a run, made before anything is written: the order of rows, the shard of each row, and a hash of it all.

Runs with the same plan hash write the same bytes, with any number of processes or tasks. The shard of a row depends on
the input only, so shards are independent: a rejected row makes its own shard shorter and moves no other row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.io.permutation import Permutation
from data_tools.samples.images import ImageOptions
from data_tools.sources import Source, SourceOptions
from data_tools.sources.base import hash_text

LAYOUT = 4
"""Increase it whenever the same input and options would give other bytes than before."""


@dataclass(frozen=True)
class ShardOptions:
    """Every option that decides the bytes written; all are part of the plan hash."""

    source: SourceOptions = field(default_factory=SourceOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    shard_size: int = 5000
    """Input rows per shard."""
    seed: int = 0
    shuffle: bool = True
    """False keeps the order of the input."""
    max_caption: int = 4096
    """Captions are cut after this many characters."""


class ShardPlan:
    """A source, the options, and the order of rows that follows from them."""

    def __init__(self, source: Source, options: ShardOptions, image_root: str, name: str) -> None:
        self.source, self.options, self.image_root, self.name = source, options, image_root, name
        self.num_rows = sum(source.blocks)
        assert self.num_rows, "open_source refuses inputs without rows"
        self.num_shards = -(-self.num_rows // options.shard_size)
        self.fingerprint = source.fingerprint()
        self.hash = hash_text(LAYOUT, asdict(options), self.num_rows, self.fingerprint)
        self._key_digits = max(8, len(str(self.num_rows - 1)))
        self._windows = _windows(source.blocks, options) if options.shuffle else []

    def shard_name(self, shard: int) -> str:
        """00000.tar, 00001.tar ..."""
        return f"{shard:05d}.tar"

    def key(self, row: int) -> str:
        """The key of an input row: its number, which is short, unique and without dots, unlike file names."""
        return f"{row:0{self._key_digits}d}"

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """The numbers of the input rows in a shard, in shard order."""
        start = shard * self.options.shard_size
        positions = np.arange(start, min(start + self.options.shard_size, self.num_rows))
        if not self.options.shuffle:
            return positions
        parts = []
        first = 0
        for number, blocks in enumerate(self._windows):
            count = sum(size for _, size in blocks)
            inside = positions[(positions >= first) & (positions < first + count)] - first
            if inside.size:
                parts.append(_spread(blocks, Permutation(count, self.options.seed * 1_000_003 + number)(inside)))
            first += count
        return np.concatenate(parts)

    def describe(self) -> dict[str, Any]:
        """The content of ``plan.json``: enough to detect other options and to name them."""
        return {
            "plan": self.hash,
            "shards": self.num_shards,
            "input": {"name": self.name, "rows": self.num_rows, "fingerprint": self.fingerprint},
            "options": asdict(self.options),
            "classes": self.source.classes,
            "problems": [problem._asdict() for problem in self.source.problems],
        }


def _windows(blocks: list[int], options: ShardOptions) -> list[list[tuple[int, int]]]:
    """The blocks in permuted order, grouped into windows of at least one shard's rows, as (first row, rows). A block
    that must be read as a whole is then read for few shards only, and every shard mixes several blocks."""
    starts = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
    windows: list[list[tuple[int, int]]] = [[]]
    held = 0
    for block in Permutation(len(blocks), options.seed)(np.arange(len(blocks))).tolist():
        if held >= options.shard_size:
            windows.append([])
            held = 0
        windows[-1].append((int(starts[block]), blocks[block]))
        held += blocks[block]
    return windows


def _spread(blocks: list[tuple[int, int]], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in a window -> row numbers of the input."""
    edges = np.concatenate([[0], np.cumsum([size for _, size in blocks])])
    which = np.searchsorted(edges, places, side="right") - 1
    return np.array([first for first, _ in blocks], np.int64)[which] + places - edges[which]
