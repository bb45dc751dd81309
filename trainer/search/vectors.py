"""Exact nearest neighbours among unit vectors in a memory-mapped file, by a matrix product over all of them.

    vectors = Vectors(dataset.column("search-1a2b3c4d-image"), empty=0)
    samples, scores = vectors.nearest(query, 24)

An approximate index (HNSW, IVF) needs memory and time to build, and misses results under a selective filter. Reading a
million float16 vectors of width 768 takes about 65 ms of one core, and needs no memory beside the mapped file.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 16_384
"""Rows per task: small enough to balance the cores."""
FEW = 32
"""If fewer than 1 in ``FEW`` rows pass the filter, those rows are gathered instead of reading all."""


class Nearest(NamedTuple):
    """Best first; ties by sample number."""

    samples: NDArray[np.int64]
    scores: NDArray[np.float32]
    """Cosines, from float32 products of the stored rows."""


class Vectors:
    """Rows [n, d] float16 of length 1, usually memory-mapped. Rows of zeros are never returned; ``empty`` is their
    number, None if it is unknown."""

    def __init__(self, rows: NDArray[np.float16], empty: int | None = None, threads: int = 1) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a read-only map; nothing here writes to it
            self._rows = torch.from_numpy(np.asarray(rows))
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._usable: Tensor | None = None
        if empty != 0:
            self._usable = torch.cat(self._each_block(lambda block: block.view(torch.int16).ne(0).any(dim=1)))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, sample: int) -> NDArray[np.float32]:
        """One stored vector [d]; zeros if the sample has none."""
        return self._rows[sample].float().numpy()

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown()

    def nearest(self, query: NDArray[np.float32], count: int, among: NDArray[np.bool_] | None = None) -> Nearest:
        """The ``count`` rows with the largest inner product with ``query`` [d], among those that are True in ``among``
        [n]; fewer if there are not so many."""
        wanted = torch.from_numpy(np.asarray(query, np.float32))
        chosen = self._usable
        if among is not None:
            asked = torch.from_numpy(among)
            chosen = asked if chosen is None else asked & chosen
        size = len(self) if chosen is None else int(chosen.sum())
        count = min(count, size)
        if count == 0:
            return Nearest(np.zeros(0, np.int64), np.zeros(0, np.float32))
        if chosen is not None and size * FEW < len(self):
            return self._best(chosen.nonzero()[:, 0], wanted, count)
        return self._best(self._candidates(wanted, count, chosen), wanted, count)

    def _candidates(self, query: Tensor, count: int, chosen: Tensor | None) -> Tensor:
        """A superset of the best rows: products of float16 numbers with float32 sums, and a bound on their error."""
        half = query.half()
        rough = torch.cat(self._each_block(lambda block: torch.mv(block, half))).float()
        if chosen is not None:
            rough[~chosen] = -torch.inf
        best = rough.topk(count).values
        # Rounding of the query (|row| < 1.001), of the results (2^-11 relative), and the order of the float32 sums.
        largest = torch.maximum(best[0].abs(), best[-1].abs())
        error = 1.001 * (query - half.float()).norm() + 1.001 * 2.0**-11 * largest + 1e-5
        return (rough >= best[-1] - 2 * error).nonzero()[:, 0]

    def _best(self, candidates: Tensor, query: Tensor, count: int) -> Nearest:
        scores = torch.cat([self._rows[part].float() @ query for part in candidates.split(BLOCK)])
        order = torch.sort(scores, descending=True, stable=True).indices[:count]
        return Nearest(candidates[order].numpy(), scores[order].numpy())

    def _each_block(self, call: Any) -> list[Tensor]:
        return list(self._pool.map(call, self._rows.split(BLOCK)))
