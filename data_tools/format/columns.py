"""What becomes of side-car columns (of `join` and of `python -m trainer.embed`) when a dataset's manifest is written
anew.

A column is one value a sample, in the order of samples: it stays true while they are the same samples in the same
order, and is left out, with a line that says so, when they are not. Its files stay in columns/ either way.
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
"""Name -> what the manifest says of the column."""
KEPT, CHANGED = f"{PARTS}/columns.json", f"{PARTS}/samples-changed"
REMEDY = "make them anew with `python -m data_tools join` or `python -m trainer.embed`"


@contextmanager
def amended_columns(dataset: Dataset) -> Iterator[Entries]:
    """Adds columns to a finished local dataset: the manifest names what is in the yielded dict at the end of the block.

    Waits for other processes that add columns (``join`` and ``trainer.embed`` share this lock), and keeps them away.
    Raises UserError where the shards have changed since ``dataset`` was opened.
    """
    folder = Path(dataset.root, "columns")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock") as lock:
        lock.acquire(on_wait=lambda: _say(f"{dataset.root}: waiting for another process that is adding columns"))
        if not lock.supported:
            _say(f"{dataset.root}: this file system has no locks; add columns one at a time")
        manifest = Dataset.open(dataset.root).manifest  # another column may have been added meanwhile
        if manifest["shards"] != dataset.manifest["shards"]:
            raise UserError(f"{dataset.root}: its shards have changed meanwhile; run again")
        entries: Entries = {}
        yield entries
        manifest = {**manifest, "columns": {**manifest.get("columns", {}), **entries}}
        write_atomic(Path(dataset.root, MANIFEST), json_text(manifest))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def put_aside(output: Output, manifest: dict[str, Any]) -> None:
    """Before a manifest is taken back: remembers its columns, and the shards for which they were made."""
    if manifest.get("columns"):
        output.write_json(KEPT, {"columns": manifest["columns"], "shards": manifest["shards"]})


def taken_up(output: Output, shards: list[dict[str, Any]]) -> Entries:
    """The columns that were put aside, if the shards have become what they were; says which are lost otherwise."""
    kept = output.read_json(KEPT)
    if kept is None:
        say_unnamed(output)
        return {}
    if kept["shards"] == shards:
        return dict(kept["columns"])
    say_left_out(output.root, kept["columns"], "the shards are not what they were")
    return {}


def note_change(output: Output, old: dict[str, Any] | None, shard: int, rows: NDArray[np.void]) -> None:
    """Before an index is written over: remembers it if ``rows`` are other keys or pictures, or in another order, than
    those it names.

    In a file, as a run that is killed before its manifest leaves no old index to compare with.
    """
    if old is None or output.size(CHANGED) is not None:
        return
    try:
        there = Dataset(output.root, old).shard(shard)
        same = np.array_equal(there["key_hash"], rows["key_hash"]) and np.array_equal(there["digest"], rows["digest"])
    except UserError:  # lost or cut: nobody knows any more
        same = False
    if not same:
        output.write(CHANGED, b"")


def still_true(output: Output, old: dict[str, Any] | None) -> Entries:
    """The columns of ``old`` for tars that have changed since, if keys and pictures have not; says which are lost.

    Embeddings of captions go in any case: an index does not tell whether a caption is what it was.
    """
    columns: Entries = (old or {}).get("columns", {})
    if not columns:
        say_unnamed(output)
        return {}
    if output.size(CHANGED) is not None:
        say_left_out(output.root, columns, "the samples are not what they were")
        return {}
    of_text = [name for name, entry in columns.items() if entry.get("side") == "text"]
    kept = {name: entry for name, entry in columns.items() if name.removesuffix(".scale") not in of_text}
    if of_text:
        say_left_out(output.root, of_text, "the tars have changed, perhaps their captions")
    return kept


def say_left_out(root: str, columns: Iterable[str], why: str) -> None:
    """One line with the names and the remedy."""
    print(f"{root}: {why}, so these columns are left out: {', '.join(sorted(columns))}; {REMEDY}", file=sys.stderr)


def say_unnamed(output: Output) -> None:
    """Where files of columns lie there and the manifest that named them is gone, so that nobody can tell what they
    are."""
    files = [] if output.is_remote else sorted(path.name for path in Path(output.root, "columns").glob("*.npy"))
    if files:
        say_left_out(output.root, files, "no manifest names what lies in columns/")
