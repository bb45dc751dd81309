"""Embeddings of a locked tower as a side-car column of a dataset: read row by row in training, written in parts that
survive a kill.

    column = PrecomputedColumn(dataset, preprocess.precomputed)         # raises UserError for another tower's
    column.read(17)                                                     # [k] float16

A column is a file ``columns/NAME.npy`` [num_samples, k] in sample order, as `python -m data_tools join` writes it, so
views keep it and tars are not rewritten. It is float16, or int8 with a column ``NAME.scale`` (float32, a factor per
row). Its entry in the manifest identifies the tower. A row of zeros is a sample that could not be embedded: it counts
as damaged, as it would with the tower.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format.columns import amended_columns
from data_tools.format.index import MANIFEST, Dataset, Strings, load_array
from data_tools.io.files import atomic_file
from data_tools.io.lock import FileLock
from trainer.core.types import PrecomputedTower, UserError
from trainer.data.transforms import Damaged

Storage = Literal["fp16", "int8", "fp32"]
Half = NDArray[np.float16]
ROWS = 8192
"""Samples per part; a killed run loses at most one part on each rank."""


def entry_of(dataset: Dataset, name: str, subject: str) -> dict[str, Any]:
    """A column's entry in the manifest. Raises UserError, which begins with ``subject``, if there is none."""
    entry: dict[str, Any] | None = dataset.manifest.get("columns", {}).get(name)
    if entry is None:
        there = ", ".join(dataset.columns) or "none"
        raise UserError(
            f"{subject} not there, or not finished (columns: {there}); run `python -m trainer.embed RECIPE`"
        )
    return entry


class PrecomputedColumn:
    """The rows of one dataset's column. Raises UserError if it is missing, incomplete, or of another tower."""

    def __init__(self, dataset: Dataset, precomputed: PrecomputedTower, captions: list[str]) -> None:
        where = f"{dataset.root}: the stored embeddings {precomputed.column!r}"
        again = (
            f"write others with `python -m trainer.embed RECIPE model.precomputed.{precomputed.side}=ANOTHER_NAME`, or "
            f"name the ones that fit"
        )
        entry = entry_of(dataset, precomputed.column, f"{where} are")
        if "tower" not in entry:
            raise UserError(
                f"{where} do not say which tower made them: a column of `data_tools join` cannot stand for one; {again}"
            )
        if entry["side"] != precomputed.side:
            raise UserError(
                f"{where} are of the {entry['side']} tower, model.precomputed.{precomputed.side} needs the other's; "
                f"{again}"
            )
        try:
            values = dataset.column(precomputed.column)
            scale = dataset.column(f"{precomputed.column}.scale") if entry["dtype"] == "int8" else None
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{where} cannot be read ({error}); {again}") from None
        assert not isinstance(values, Strings), "texts have no tower"
        assert not isinstance(scale, Strings), "texts have no tower"
        if values.ndim != 2 or values.shape[1] != precomputed.width:
            raise UserError(
                f"{where} have shape {list(values.shape)}, the tower gives {precomputed.width} numbers per sample; "
                f"{again}"
            )
        if entry["tower"] != precomputed.fingerprint:
            made, ours = entry["tower"][:12], precomputed.fingerprint[:12]
            raise UserError(
                f"{where} were made by another tower (fingerprint {made} of {entry['model']}, here it is {ours}); "
                f"{again}"
            )
        if len(values) != dataset.num_samples or (scale is not None and len(scale) != dataset.num_samples):
            raise UserError(f"{where} are {len(values):,}, the dataset has {dataset.num_samples:,} samples; {again}")
        if precomputed.side == "text" and entry["captions"] != captions:
            raise UserError(
                f"{where} are of the captions {entry['captions'] or 'txt'}, data.caption asks for "
                f"{captions or 'txt'}; {again}"
            )
        self.values, self.scale = values, scale

    def read(self, sample: int) -> Half:
        """One sample's embedding [k]; raises Damaged if it has none."""
        row = self.values[sample]
        if not row.any():
            raise Damaged("no stored embedding: the sample could not be used when they were computed")
        return row if self.scale is None else (row * self.scale[sample]).astype(np.float16)


def to_int8(rows: Half) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[n, k] -> int8 [n, k] and a factor per row [n]: the largest magnitude of a row becomes 127."""
    values = rows.astype(np.float32)
    scale = np.abs(values).max(axis=1) / 127
    return np.rint(values / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8), scale


class PartWriter:
    """Writes the columns of one embedding run: parts in ``.embed``, each written atomically, and the manifest last, by
    one rank. A run that finds parts of the same dataset and ``identity`` continues from them.
    """

    def __init__(self, dataset: Dataset, name: str, identity: list[Any]) -> None:
        if dataset.is_remote or not Path(dataset.root, MANIFEST).is_file():
            remedy = (
                "copy it to a local folder"
                if dataset.is_remote
                else f"`python -m data_tools index {dataset.root}` makes a manifest"
            )
            raise UserError(f"{dataset.root}: columns are written beside a local manifest: {remedy}")
        self.dataset, self.name = dataset, name
        state = [*identity, [[e["name"], e["samples"]] for e in dataset.manifest["shards"]]]
        key = xxhash.xxh3_64_hexdigest(json.dumps([state, dataset.manifest.get("plan")], sort_keys=True).encode())
        self.scratch = Path(dataset.root, ".embed")  # not data_tools' .parts, which `merge`, `index` and `join` clear
        self.folder = self.scratch / f"{name}-{key}"

    @property
    def rows(self) -> int:
        """Samples per part."""
        return ROWS

    @property
    def num_parts(self) -> int:
        return -(-self.dataset.num_samples // self.rows)

    def finished(self) -> bool:
        """Whether the columns exist already. Raises UserError if others have their name."""
        raise NotImplementedError

    def joined(self, empty: int) -> dict[str, dict[str, Any]]:
        """Writes the columns' files from their parts; returns their entries for the manifest."""
        raise NotImplementedError

    @contextmanager
    def locked(self) -> Iterator[list[int]]:
        """Excludes a second run while this process lives; yields the numbers of the parts still to be written."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        with FileLock(self.scratch / "lock") as lock:
            if not lock.acquire(timeout=0):
                raise UserError(f"{self.dataset.root}: another `trainer.embed` is writing here; wait for it or stop it")
            self.folder.mkdir(exist_ok=True)
            yield [part for part in range(self.num_parts) if not self._path(part).is_file()]

    def samples(self, part: int) -> range:
        return range(part * self.rows, min((part + 1) * self.rows, self.dataset.num_samples))

    def write(self, part: int, *arrays: NDArray[Any]) -> None:
        """Writes one part, arrays [n, ...] in sample order; the first is written last, since its file says that the
        part is there. Raises UserError if a number is too large for float16."""
        for number, rows in reversed(list(enumerate(arrays))):
            if not np.isfinite(rows).all():
                raise UserError(
                    "the tower's outputs do not fit float16 (not finite): its weights are damaged, or it cannot be "
                    "stored"
                )
            save(self._path(part, number), [rows], rows.shape, rows.dtype)

    def finish(self) -> int:
        """Joins the parts, adds the columns to the manifest and removes the parts; returns the number of samples
        without an embedding, whose rows are zeros in the first column."""
        empty = sum(
            int((~rows.reshape(len(rows), -1).any(axis=1)).sum()) for rows in map(self.part, range(self.num_parts))
        )
        with amended_columns(self.dataset) as entries:
            for left_over in Path(self.dataset.root, "columns").glob(f".{self.name}.*.tmp"):  # left by a killed run
                left_over.unlink()
            entries |= self.joined(empty)
        shutil.rmtree(self.folder)
        return empty

    def part(self, part: int, number: int = 0) -> NDArray[Any]:
        """An array of a part as it was written, memory-mapped. Raises UserError if its file is not whole."""
        path = self._path(part, number)
        try:
            rows = load_array(str(path))
        except ValueError as error:
            raise UserError(f"{path}: incomplete ({error}); remove it and run again to rewrite it") from None
        assert len(rows) == len(self.samples(part)), path
        return rows

    def _path(self, part: int, number: int = 0) -> Path:
        return self.folder / (f"{part:08d}.{number}.npy" if number else f"{part:08d}.npy")


class ColumnWriter(PartWriter):
    """Writes the column of a locked tower."""

    def __init__(
        self, dataset: Dataset, precomputed: PrecomputedTower, storage: Storage, facts: dict[str, Any]
    ) -> None:
        if storage == "fp32":
            raise UserError("--storage fp32: a locked tower's embeddings are stored as fp16 or int8")
        super().__init__(dataset, precomputed.column, [precomputed.fingerprint, precomputed.column, facts])
        self.precomputed, self.storage, self.facts = precomputed, storage, facts

    def finished(self) -> bool:
        """As PartWriter."""
        entry = self.dataset.manifest.get("columns", {}).get(self.name)
        if entry is None:
            return False
        PrecomputedColumn(self.dataset, self.precomputed, self.facts.get("captions", []))
        storage = "int8" if entry["dtype"] == "int8" else "fp16"
        if storage != self.storage:
            raise UserError(
                f"{self.dataset.root}: the column {self.name!r} is there as {storage}; give the {self.storage} "
                "another name"
            )
        return True

    def joined(self, empty: int) -> dict[str, dict[str, Any]]:
        """As PartWriter."""
        columns, name, parts = Path(self.dataset.root, "columns"), self.name, range(self.num_parts)
        count, width = self.dataset.num_samples, self.precomputed.width
        entries: dict[str, dict[str, Any]] = {}
        if self.storage == "int8":
            save(columns / f"{name}.npy", (to_int8(self.part(part))[0] for part in parts), (count, width), np.int8)
            save(columns / f"{name}.scale.npy", (to_int8(self.part(part))[1] for part in parts), (count,), np.float32)
            entries[f"{name}.scale"] = {"file": f"columns/{name}.scale.npy", "dtype": "float32", "shape": [count]}
        else:
            save(columns / f"{name}.npy", map(self.part, parts), (count, width), np.float16)
        entries[name] = {
            "file": f"columns/{name}.npy",
            "dtype": "int8" if self.storage == "int8" else "float16",
            "shape": [count, width],
            "side": self.precomputed.side,
            "tower": self.precomputed.fingerprint,
            "empty": empty,
            **self.facts,
        }
        return entries


def save(path: Path, pieces: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Writes a .npy file from consecutive pieces."""

    def chunks() -> Iterator[bytes]:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        text = repr(header)
        text += " " * (-(len(text) + 11) % 64) + "\n"
        yield b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")
        for piece in pieces:
            yield np.ascontiguousarray(piece).tobytes()

    with atomic_file(path) as file:
        file.writelines(chunks())
