"""Opens the dataset that a recipe names: a folder, a URL, a tar, or a pattern of tars.

Tars without an index are read once, header by header, and their index is kept in data.cache_dir, so that they too have
an exact order, exact resume and random access. A message says what that costs.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format.index import Dataset, load_array
from data_tools.format.scan import scan_tar
from data_tools.io.files import atomic_file
from trainer.core.types import UserError
from trainer.data.remote import ShardCache
from trainer.data.settings import DataSettings, SourceSettings
from trainer.data.sharded_dataset import ShardedDataset, missing

logger = logging.getLogger(__name__)


def open_source(source: SourceSettings, settings: DataSettings) -> ShardedDataset:
    """Opens one dataset and checks that its shards are there. Raises UserError naming the file and the remedy."""
    path = os.path.expanduser(source.path) if "://" not in source.path else source.path
    if not path:
        raise UserError(
            "data: no dataset given; name a folder of shards, for example data.train=shards/train or "
            "data.validation=shards/validation"
        )
    cache = ShardCache(settings.cache_dir, int(settings.cache_limit * 2**30)) if "://" in path else None
    dataset = _open_dataset(path, settings, cache)
    if dataset.num_samples == 0:
        raise UserError(f"{path}: has no samples; rejects.jsonl beside the shards says why")
    fields = source.caption if source.caption is not None else settings.caption
    return ShardedDataset(dataset, [fields] if isinstance(fields, str) else list(fields), settings, cache)


def _open_dataset(path: str, settings: DataSettings, cache: ShardCache | None) -> Dataset:
    if cache is not None:
        if cache.persist(path, lambda: fsspec.core.url_to_fs(path)[0].exists(f"{path.rstrip('/')}/manifest.json")):
            return MirroredDataset(path, cache.persist(path, lambda: Dataset.open(path).manifest), cache)
    elif Path(path, "manifest.json").exists():
        dataset = Dataset.open(path)
        _check_present(dataset)
        return dataset
    return _scan(path, settings, cache)


def _check_present(dataset: Dataset) -> None:
    """Raises UserError naming the first missing shard, from one listing per folder instead of a request per shard."""
    listed: dict[str, set[str]] = {}
    for shard in range(dataset.num_shards):
        path = dataset.tar_path(shard)
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder]:
            raise UserError(missing(path))


class MirroredDataset(Dataset):
    """A remote dataset whose indexes are fetched to local disk once per node and memory-mapped by every process."""

    def __init__(self, root: str, manifest: dict[str, Any], cache: ShardCache):
        super().__init__(root, manifest)
        self.mirror = cache

    def index_path(self, shard: int) -> str:
        return self.mirror.fetch_index(super().index_path(shard))


class ScannedDataset(Dataset):
    """Tars written by other tools, with indexes in the cache folder."""

    def __init__(self, root: str, manifest: dict[str, Any], indexes: list[Path]):
        super().__init__(root, manifest)
        self.indexes = indexes

    def index_path(self, shard: int) -> str:
        return str(self.indexes[shard])


def _scan(path: str, settings: DataSettings, cache: ShardCache | None) -> Dataset:
    tars = cache.persist(path, lambda: _find_tars(path)) if cache else _find_tars(path)
    if not tars:
        raise UserError(
            f"{path}: no manifest.json and no .tar there; make shards with `python -m data_tools shard`, or check "
            f"the path"
        )
    keeper = cache or ShardCache(settings.cache_dir, int(settings.cache_limit * 2**30))
    entries, indexes, problems = [], [], Counter[str]()
    said = False
    for tar in tars:
        size, stamp = keeper.persist(tar, partial(_size_and_stamp, tar)) if cache else _size_and_stamp(tar)
        kept = keeper.root / "indexes" / f"{stamp}.idx"
        with keeper.lock(kept.name):
            if not kept.exists():
                if not said:
                    logger.info(_cost(path, len(tars), cache is not None))
                    said = True
                rows, found = scan_tar(keeper.fetch(tar) if cache else tar)
                problems.update(problem.reason for problem in found)
                _save(kept, rows)
        rows = load_array(str(kept))
        entries.append(
            {"name": os.path.basename(tar), "path": tar, "samples": len(rows), "bytes": size or _reach(rows)}
        )
        indexes.append(kept)
    if problems:
        listed = ", ".join(f"{reason} {count}" for reason, count in problems.most_common())
        logger.warning(f"{path}: its tars have problems, only their complete samples are used: {listed}")
    return ScannedDataset(path, {"shards": entries, "max_captions": 1}, indexes)


def _cost(path: str, count: int, remote: bool) -> str:
    how = "fetching and reading each tar once" if remote else "reading each tar once"
    return (
        f"data: {path} has no index: building one for {count} tars by {how}; `python -m data_tools index` would "
        f"store it beside them"
    )


def _save(path: Path, rows: NDArray[np.void]) -> None:
    with atomic_file(path) as file:
        np.save(file, rows)


def _reach(rows: NDArray[np.void]) -> int:
    """The end of the last indexed member: nearly the size of the tar, if the server does not tell it."""
    return max(
        (int((rows[f"{kind}_offset"] + rows[f"{kind}_size"]).max()) for kind in ("image", "text", "json") if len(rows)),
        default=0,
    )


def _size_and_stamp(tar: str) -> tuple[int, str]:
    """(Size in bytes, 0 if the server does not tell; a stamp that changes when the tar does, so that a cached index
    never belongs to another tar)."""
    if "://" in tar:
        fs, inner = fsspec.core.url_to_fs(tar)
        info = fs.info(inner)
        size = info.get("size")
        stamp = [tar, size, info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created")]
    else:
        stat = os.stat(tar)
        size = stat.st_size
        stamp = [os.path.abspath(tar), size, stat.st_mtime_ns]
    return int(size or 0), xxhash.xxh3_128_hexdigest("\n".join(map(str, stamp)).encode())


def _find_tars(path: str) -> list[str]:
    found: list[str] = []
    for one in _braces(path):
        if "://" in one:
            fs, inner = fsspec.core.url_to_fs(one)
            pattern = inner if inner.endswith(".tar") else f"{inner.rstrip('/')}/*.tar"
            matches = sorted(map(str, fs.glob(pattern))) if "*" in pattern else [inner]
            found += [fs.unstrip_protocol(match) for match in matches]
        elif os.path.isdir(one):
            found += sorted(glob.glob(f"{glob.escape(one)}/*.tar"))
        elif "*" in one:
            found += sorted(glob.glob(one))
        else:
            found.append(one)
    for tar in found:
        if "://" not in tar and not os.path.isfile(tar):
            raise UserError(f"{tar}: no such file; check the path, or make shards with `python -m data_tools shard`")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """Expands {000..123} and {a,b}, as webdataset and the shell do."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    choices = (
        [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)] if span else match[1].split(",")
    )
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])
