"""One function over every shard of a dataset, in several processes: what verify, stats, dedup and filter have in
common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from data_tools.format.index import Dataset
from data_tools.io.errors import UserError
from data_tools.io.workers import run_workers

R = TypeVar("R")


def over_shards(work: Callable[[int], R], num_shards: int, processes: int) -> Iterator[R]:
    """``work(shard)`` for every shard, in order; errors as of ``run_workers``."""
    return run_workers(lambda shard, _: work(shard), range(num_shards), processes)


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
    """The dataset in a local folder. Raises UserError for a remote one, whose tars these commands cannot read in
    place."""
    if "://" in root:
        raise UserError(f"{root}: this command reads local datasets; copy it first")
    return Dataset.open(root)
