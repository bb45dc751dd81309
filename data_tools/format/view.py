"""Views: folders with a manifest and indexes whose rows point into the tars of another dataset. No image is copied.

The loader reads a view like any dataset. `filter` and `dedup` write views; the dataset that a view points to must stay
where it is.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.index import FORMAT, MANIFEST, VERSION, Dataset, Strings, index_name
from data_tools.io.errors import UserError
from data_tools.io.output import Output
from data_tools.sources.base import hash_text


def open_view(root: str, dataset: Dataset) -> Output:
    """Creates an empty folder for a view. Raises UserError if it is not empty."""
    output = Output(root)
    if output.is_remote:
        raise UserError(f"{root}: a view is written to a local folder; name one")
    if Path(root).exists() and any(Path(root).iterdir()):
        raise UserError(f"{root}: not empty; choose another folder, or remove this one")
    assert not dataset.is_remote
    return output


def write_view(output: Output, dataset: Dataset, keep: NDArray[np.bool_], made_by: dict[str, Any]) -> dict[str, Any]:
    """Writes the samples of ``dataset`` where ``keep`` [num_samples] is True, side-car columns too, and returns the
    manifest."""
    if not keep.any():
        raise UserError(f"{dataset.root}: no sample meets the conditions; nothing was written")
    output.start()
    shards = []
    for number, entry in enumerate(dataset.manifest["shards"]):
        mine = keep[dataset.counts[number] : dataset.counts[number + 1]]
        if not mine.any():
            continue
        _write_array(output, index_name(entry["name"]), np.asarray(dataset.shard(number)[mine]))
        path = os.path.relpath(dataset.tar_path(number), output.root)
        shards.append({**entry, "path": path, "samples": int(mine.sum())})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "plan": hash_text(dataset.manifest["plan"], made_by),
        "shards": shards,
        "samples": int(keep.sum()),
        "max_captions": dataset.max_captions,
        "rejected": {},
        "view": {"of": os.path.relpath(dataset.root, output.root), **made_by},
    }
    if dataset.columns:
        # An entry also says what made the values, which holds for a subset too.
        manifest["columns"] = {
            name: {
                **dataset.manifest["columns"][name],
                **write_column(output, name, _chosen(dataset.column(name), keep)),
            }
            for name in dataset.columns
        }
    output.write_json(MANIFEST, manifest)
    output.finish()
    return manifest


def _chosen(values: NDArray[Any] | Strings, keep: NDArray[np.bool_]) -> NDArray[Any] | list[str]:
    if isinstance(values, Strings):
        return [values[int(sample)] for sample in np.flatnonzero(keep)]
    return np.asarray(values[keep])


def write_column(output: Output, name: str, values: NDArray[Any] | list[str]) -> dict[str, Any]:
    """Writes a side-car column (columns/NAME.npy, for texts also NAME.text.npy) and returns its entry for the
    manifest."""
    os.makedirs(f"{output.root}/columns", exist_ok=True)
    file = f"columns/{name}.npy"
    if isinstance(values, list):
        texts = [value.encode() for value in values]
        edges = np.concatenate([[0], np.cumsum([len(text) for text in texts], dtype=np.int64)]).astype(np.int64)
        _write_array(output, file, edges)
        _write_array(output, f"columns/{name}.text.npy", np.frombuffer(b"".join(texts), np.uint8))
        return {"file": file, "text": f"columns/{name}.text.npy", "samples": len(values)}
    _write_array(output, file, values)
    return {"file": file, "dtype": str(values.dtype), "shape": list(values.shape)}


def _write_array(output: Output, name: str, values: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    output.write(name, buffer.getvalue())
