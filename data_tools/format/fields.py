"""Reads one value per sample by name: from the index, a side-car column, or the .json members."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.index import Dataset, Strings
from data_tools.format.map_shards import TarReader, over_shards
from data_tools.format.scan import read_key
from data_tools.io.errors import UserError

_FORMATS = {0: "other", 1: "jpg", 2: "png", 3: "webp"}
FROM_INDEX = ("width", "height", "min_side", "aspect", "image_bytes", "caption_bytes", "format")
"""Names that the index answers without reading the tars; they shadow columns of the same name in the .json."""


def values_of(dataset: Dataset, names: list[str], processes: int) -> dict[str, list[Any]]:
    """Name -> one value per sample, None where a sample has none. Raises UserError for a name that no sample has."""
    found: dict[str, list[Any]] = {}
    from_json = [name for name in names if name not in FROM_INDEX and name not in dataset.columns]
    for name in names:
        if name in dataset.columns:
            found[name] = _column(dataset, name)
        elif name in FROM_INDEX:
            parts = [_index_values(dataset.shard(shard), name) for shard in range(dataset.num_shards)]
            found[name] = [value for part in parts for value in part]
    if from_json:
        shards = list(over_shards(partial(_json_values, dataset, from_json), dataset.num_shards, processes))
        for place, name in enumerate(from_json):
            found[name] = [value for shard in shards for value in shard[place]]
            if all(value is None for value in found[name]):
                known = ", ".join([*FROM_INDEX, *dataset.columns, "caption", "key"])
                raise UserError(f"{dataset.root}: no sample has {name!r} in its .json member; other names are: {known}")
    return found


def _column(dataset: Dataset, name: str) -> list[Any]:
    values = dataset.column(name)
    if isinstance(values, Strings):
        return [values[sample] for sample in range(len(values))]
    if values.ndim != 1:
        raise UserError(
            f"{dataset.root}: side-car column {name!r} has {values.shape[1:]} numbers per sample; only single values "
            f"can be compared"
        )
    return [None if isinstance(value, float) and value != value else value for value in values.tolist()]


def _index_values(rows: NDArray[np.void], name: str) -> list[Any]:
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    if name == "format":
        return [_FORMATS[value] for value in rows["image_format"].tolist()]
    if name == "min_side":
        return list(np.minimum(width, height).tolist())
    if name == "aspect":
        return list((np.maximum(width, height) / np.maximum(1, np.minimum(width, height))).tolist())
    source = {"image_bytes": "image_size", "caption_bytes": "text_size"}.get(name, name)
    return list(rows[source].tolist())


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
