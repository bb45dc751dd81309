"""Reads one value per sample by name: from the index, a side-car column, or the .json members."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.expression import Values
from data_tools.format.index import Dataset, Strings
from data_tools.format.map_shards import TarReader, over_shards
from data_tools.format.scan import read_key
from data_tools.io.errors import UserError

_FORMATS = {0: "other", 1: "jpg", 2: "png", 3: "webp"}
FROM_INDEX = ("width", "height", "min_side", "aspect", "image_bytes", "caption_bytes", "format")
"""Names that the index answers without reading the tars; they shadow columns of the same name in the .json."""


class StoredColumns:
    """Values from the index and from side-car columns, shard by shard: what training reads.

    Raises UserError, which begins with ``option``, for a name that is neither.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], option: str) -> None:
        there = [*dataset.columns, *FROM_INDEX]
        for name in names:
            if name not in there:
                near = "".join(f", perhaps {other!r}" for other in difflib.get_close_matches(name, there, 1))
                raise UserError(
                    f"{option}: no column {name!r} beside {dataset.root}{near}; there are: {', '.join(there)} (`python "
                    f"-m data_tools filter` also reads values in the .json members)"
                )
        self.dataset, self.names = dataset, list(names)
        self.columns = {name: _checked_column(dataset, name) for name in names if name in dataset.columns}

    def shard(self, shard: int) -> dict[str, Values]:
        """Name -> the values of one shard's samples."""
        start, stop = int(self.dataset.counts[shard]), int(self.dataset.counts[shard + 1])
        found: dict[str, Values] = {}
        for name in self.names:
            values = self.columns.get(name)
            if values is None:
                found[name] = _index_values(self.dataset.shard(shard), name)
            elif isinstance(values, Strings):
                found[name] = [values[sample] for sample in range(start, stop)]
            else:
                found[name] = np.asarray(values[start:stop])
        return found


def values_of(dataset: Dataset, names: list[str], processes: int) -> dict[str, list[Any]]:
    """Name -> one value per sample, None where a sample has none. Raises UserError for a name that no sample has."""
    found: dict[str, list[Any]] = {}
    from_json = [name for name in names if name not in FROM_INDEX and name not in dataset.columns]
    for name in names:
        if name in dataset.columns:
            found[name] = _column(dataset, name)
        elif name in FROM_INDEX:
            parts = [_index_values(dataset.shard(shard), name) for shard in range(dataset.num_shards)]
            found[name] = [value for part in parts for value in _listed(part)]
    if from_json:
        shards = list(over_shards(partial(_json_values, dataset, from_json), dataset.num_shards, processes))
        for place, name in enumerate(from_json):
            found[name] = [value for shard in shards for value in shard[place]]
            if all(value is None for value in found[name]):
                known = ", ".join([*FROM_INDEX, *dataset.columns, "caption", "key"])
                raise UserError(f"{dataset.root}: no sample has {name!r} in its .json member; other names are: {known}")
    return found


def _column(dataset: Dataset, name: str) -> list[Any]:
    values = _checked_column(dataset, name)
    if isinstance(values, Strings):
        return [values[sample] for sample in range(len(values))]
    return _listed(values)


def _checked_column(dataset: Dataset, name: str) -> NDArray[Any] | Strings:
    """A side-car column with one value per sample. Raises UserError for any other."""
    values = dataset.column(name)
    if not isinstance(values, Strings) and values.ndim != 1:
        raise UserError(
            f"{dataset.root}: side-car column {name!r} has {values.shape[1:]} numbers per sample; only single values "
            f"can be compared"
        )
    if len(values) != dataset.num_samples:
        raise UserError(
            f"{dataset.root}: side-car column {name!r} has {len(values):,} values for {dataset.num_samples:,} samples; "
            f"write it again"
        )
    return values


def _listed(values: Values) -> list[Any]:
    """As a list, None for NaN."""
    return [None if isinstance(value, float) and value != value else value for value in np.asarray(values).tolist()]


def _index_values(rows: NDArray[np.void], name: str) -> Values:
    if name == "format":
        return [_FORMATS[value] for value in rows["image_format"].tolist()]
    if name in ("image_bytes", "caption_bytes"):
        return rows["image_size" if name == "image_bytes" else "text_size"].astype(np.int64)
    width, height = (_known(rows[side].astype(np.int64)) for side in ("width", "height"))
    values: dict[str, NDArray[Any]] = {
        "width": width,
        "height": height,
        "min_side": np.minimum(width, height),
        "aspect": np.maximum(width, height) / np.minimum(width, height),
    }
    return values[name]


def _known(sides: NDArray[np.int64]) -> NDArray[Any]:
    """NaN where a side is 0: unknown."""
    return sides if sides.all() else np.where(sides > 0, sides, np.nan)


def _json_values(dataset: Dataset, names: list[str], shard: int) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in names]
    with TarReader(dataset.tar_path(shard)) as tar:
        for row in dataset.shard(shard):
            try:
                record = json.loads(tar.read(row, "json") or b"{}")
            except ValueError:
                record = {}
            for place, name in enumerate(names):
                if name == "caption":
                    value: Any = tar.read(row, "text").decode("utf-8", "replace")
                elif name == "key":
                    value = read_key(tar.descriptor, row)
                else:
                    value = record.get(name) if isinstance(record, dict) else None
                found[place].append(value)
    return found
