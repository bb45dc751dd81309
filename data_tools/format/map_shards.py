"""One function over every shard of a dataset, in several processes: what verify, stats, dedup and filter have in
common."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple, TypeVar

import numpy as np

from data_tools.format.index import Dataset
from data_tools.io.errors import UserError

R = TypeVar("R")


def over_shards(work: Callable[[int], R], num_shards: int, processes: int) -> Iterator[R]:
    """``work(shard)`` for every shard, in order. ``work`` must be picklable; its UserErrors reach the caller."""
    if processes <= 1 or num_shards <= 1:
        yield from map(work, range(num_shards))
        return
    with ProcessPoolExecutor(min(processes, num_shards), multiprocessing.get_context("fork")) as pool:
        try:
            yield from pool.map(work, range(num_shards))
        except BrokenProcessPool:
            raise UserError("a worker died (out of memory?); try fewer --processes") from None
        finally:
            pool.shutdown(cancel_futures=True)


class TarReader:
    """Members of one local tar by their index rows."""

    def __init__(self, path: str) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; fetch or write this shard again") from None

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read(self, row: np.void, kind: str) -> bytes:
        """The bytes of a sample's "image", "text" or "json"; b"" where it has none."""
        return os.pread(self.descriptor, int(row[f"{kind}_size"]), int(row[f"{kind}_offset"]))


class Place(NamedTuple):
    """A sample by where it lies."""

    shard: int
    row: int


def open_local(root: str) -> Dataset:
    """The dataset in a local folder. Raises UserError for a remote one, whose tars these commands cannot read in place."""
    if "://" in root:
        raise UserError(f"{root}: this command reads local datasets; copy it first")
    return Dataset.open(root)
