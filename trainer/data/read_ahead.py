"""Reads the samples of the next batch in threads, while the present one is embedded.

for inputs in read_ahead(batches(samples, 256), read, threads=4):
    ...                                                         # [read(sample) for the samples of a batch]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Read = TypeVar("Read")


def batches(samples: range, size: int) -> list[range]:
    """``samples`` in pieces of at most ``size``."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def read_ahead(batches: Sequence[range], read: Callable[[int], Read], threads: int) -> Iterator[list[Read]]:
    """Yields the results of ``read`` for each batch in order; the batch after it is being read meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[list[Future[Read]]] = []
        for index in range(len(batches) + 1):
            if index < len(batches):
                ahead.append([pool.submit(read, sample) for sample in batches[index]])
            if index:
                yield [future.result() for future in ahead.pop(0)]
