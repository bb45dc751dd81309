"""Keeps side-car columns (of `join` and of `python -m trainer.embed`) when a dataset's manifest is rewritten.

A column has one value per sample, in sample order. It stays valid while the samples and their order are the same;
otherwise it is dropped from the manifest with a message. Its files stay in columns/ either way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.index import MANIFEST, Dataset
from data_tools.io.errors import UserError
from data_tools.io.files import write_atomic
from data_tools.io.lock import FileLock
from data_tools.io.output import PARTS, Output, json_text

Entries = dict[str, dict[str, Any]]
"""Name -> the column's entry in the manifest."""
KEPT, CHANGED = f"{PARTS}/columns.json", f"{PARTS}/samples-changed"
REMEDY = "add them again with `python -m data_tools join` or `python -m trainer.embed`"


@contextmanager
def amended_columns(dataset: Dataset) -> Iterator[Entries]:
    """Adds columns to a finished local dataset: the entries of the yielded dict are in the manifest after the block.

    Holds the lock that ``join`` and ``trainer.embed`` share, after waiting for it. Raises UserError if the shards have
    changed since ``dataset`` was opened.
    """
    with _locked_manifest(dataset) as manifest:
        entries: Entries = {}
        yield entries
        manifest["columns"] = {**manifest.get("columns", {}), **entries}


def remove_columns(dataset: Dataset, names: Iterable[str]) -> int:
    """Removes columns and their files from a finished local dataset; returns the number of bytes freed. Processes that
    have mapped a file keep it until they end."""
    with _locked_manifest(dataset) as manifest:
        removed = [manifest["columns"].pop(name) for name in names]
    freed = 0
    for file in [entry[part] for entry in removed for part in ("file", "text") if part in entry]:
        path = Path(dataset.root, file)
        freed += path.stat().st_size if path.is_file() else 0
        path.unlink(missing_ok=True)
    return freed


@contextmanager
def _locked_manifest(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The current manifest, which is written back after the block. Errors as in ``amended_columns``."""
    folder = Path(dataset.root, "columns")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock") as lock:
        lock.acquire(on_wait=lambda: _say(f"{dataset.root}: waiting for another process that is adding columns"))
        if not lock.supported:
            _say(f"{dataset.root}: this file system has no locks; add columns one at a time")
        manifest = Dataset.open(dataset.root).manifest  # another process may have added a column
        if manifest["shards"] != dataset.manifest["shards"]:
            raise UserError(f"{dataset.root}: its shards were changed during this run; run again")
        yield manifest
        write_atomic(Path(dataset.root, MANIFEST), json_text(manifest))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def put_aside(output: Output, manifest: dict[str, Any]) -> None:
    """Call before removing a manifest: saves its columns, and the shards that they belong to."""
    if manifest.get("columns"):
        output.write_json(KEPT, {"columns": manifest["columns"], "shards": manifest["shards"]})


def taken_up(output: Output, shards: list[dict[str, Any]]) -> Entries:
    """The columns that ``put_aside`` saved, if the shards are the same again; otherwise warns which are lost."""
    kept = output.read_json(KEPT)
    if kept is None:
        say_unnamed(output)
        return {}
    if kept["shards"] == shards:
        return dict(kept["columns"])
    say_left_out(output.root, kept["columns"], "the shards have changed")
    return {}


def note_change(output: Output, old: dict[str, Any] | None, shard: int, rows: NDArray[np.void]) -> None:
    """Call before overwriting an index: records in a file if ``rows`` have other keys or images, or another order.

    The file is needed because a run that is killed before it writes the manifest leaves no old index to compare with.
    """
    if old is None or output.size(CHANGED) is not None:
        return
    try:
        there = Dataset(output.root, old).shard(shard)
        same = np.array_equal(there["key_hash"], rows["key_hash"]) and np.array_equal(there["digest"], rows["digest"])
    except UserError:  # lost or cut: the old samples are unknown
        same = False
    if not same:
        output.write(CHANGED, b"")


def still_true(output: Output, old: dict[str, Any] | None) -> Entries:
    """The columns of ``old`` that are still valid although tars have changed: keys and images have not. Warns which
    are lost.

    Embeddings of captions are always lost: an index does not tell whether a caption has changed.
    """
    columns: Entries = (old or {}).get("columns", {})
    if not columns:
        say_unnamed(output)
        return {}
    if output.size(CHANGED) is not None:
        say_left_out(output.root, columns, "the samples have changed")
        return {}
    of_text = [name for name, entry in columns.items() if entry.get("side") == "text"]
    kept = {name: entry for name, entry in columns.items() if name.removesuffix(".scale") not in of_text}
    if of_text:
        say_left_out(output.root, of_text, "the tars have changed, possibly their captions")
    return kept


def say_left_out(root: str, columns: Iterable[str], why: str) -> None:
    """Prints the names and the remedy in one line."""
    print(f"{root}: {why}, so these columns are dropped: {', '.join(sorted(columns))}; {REMEDY}", file=sys.stderr)


def say_unnamed(output: Output) -> None:
    """Warns of column files that no manifest names: nothing says what they contain."""
    files = [] if output.is_remote else sorted(path.name for path in Path(output.root, "columns").glob("*.npy"))
    if files:
        say_left_out(output.root, files, "no manifest names the files in columns/")
