"""Runs one function over every shard of a dataset in several processes, for verify, stats, dedup and filter."""

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
    """Yields ``work(shard)`` for every shard, in order. Raises what ``run_workers`` raises."""
    return run_workers(lambda shard, _: work(shard), range(num_shards), processes)


class TarReader:
    """Reads members of one local tar by their index rows."""

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
        """The bytes of a sample's "image", "text" or "json"; b"" if it has none."""
        return os.pread(self.descriptor, int(row[f"{kind}_size"]), int(row[f"{kind}_offset"]))


class Place(NamedTuple):
    """The location of a sample."""

    shard: int
    row: int


def open_local(root: str) -> Dataset:
    """The dataset in a local folder. Raises UserError for a remote one: these commands read tars in place."""
    if "://" in root:
        raise UserError(f"{root}: this command reads local datasets; copy it first")
    return Dataset.open(root)
