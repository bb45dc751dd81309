"""Parquet files, read by row group, and Hugging Face datasets on disk (Arrow files), read in place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.io.errors import UserError
from data_tools.sources.base import Problem, Row, SourceOptions, hash_text, image_value, require_columns, split_columns

_CACHE_BYTES = 512 << 20


class ParquetSource:
    """One or several Parquet files of one schema. A row group is a block: it is read as a whole, for one shard or a
    few."""

    def __init__(self, paths: list[Path], options: SourceOptions) -> None:
        self.paths, self.options = paths, options
        self.problems: list[Problem] = []
        self.blocks: list[int] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each block
        footers = []
        for number, path in enumerate(paths):
            with _explained(path):
                meta = pq.read_metadata(path)
            footers.append((path.name, path.stat().st_size, _footer_hash(path, meta.serialized_size)))
            for group in range(meta.num_row_groups):
                self.blocks.append(meta.row_group(group).num_rows)
                self._groups.append((number, group))
            if number == 0:
                self.columns = list(meta.schema.to_arrow_schema().names)
        require_columns(str(paths[0]), self.columns, options)
        self._print = hash_text(footers)
        self._cached: tuple[int, pa.Table] | None = None

    def fingerprint(self) -> str:
        return self._print

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.blocks)]).astype(np.int64)

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        which = np.searchsorted(self._edges, numbers, side="right") - 1
        places = np.zeros(len(numbers), np.int64)
        tables: dict[int, pa.Table] = {}
        for block in np.unique(which).tolist():
            mine = which == block
            tables[block] = self._read(block).take(pa.array(numbers[mine] - self._edges[block]))
            places[mine] = np.arange(int(mine.sum()))
        for number, block, place in zip(numbers.tolist(), which.tolist(), places.tolist(), strict=True):
            file, group = self._groups[block]
            line = number - int(self._edges[block - group])
            yield arrow_row(tables[block], place, f"{self.paths[file].name}:{line}", self.options)

    def _read(self, block: int) -> pa.Table:
        # A shard smaller than a row group comes back for the same one: keep the last, unless it holds pictures.
        if self._cached is None or self._cached[0] != block:
            file, group = self._groups[block]
            with _explained(self.paths[file]):
                table = pq.ParquetFile(self.paths[file]).read_row_group(group, use_threads=False)
            if table.nbytes > _CACHE_BYTES:
                return table
            self._cached = (block, table)
        return self._cached[1]


class ArrowSource:
    """A folder written by ``Dataset.save_to_disk`` of Hugging Face datasets, or single Arrow files; mapped, not
    read."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.options = path, options
        self.problems: list[Problem] = []
        self.paths = [path] if path.is_file() else _files_of(path)
        self._tables = [_map(file) for file in self.paths]
        self.columns = list(self._tables[0].column_names)
        require_columns(str(path), self.columns, options)
        self._edges = np.concatenate([[0], np.cumsum([table.num_rows for table in self._tables])]).astype(np.int64)
        self.blocks = [int(self._edges[-1])]

    def fingerprint(self) -> str:
        state = self.path / "state.json"
        mark = json.loads(state.read_text()).get("_fingerprint") if self.path.is_dir() else None
        return hash_text(mark, [(file.name, file.stat().st_size) for file in self.paths])

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        which = np.searchsorted(self._edges, numbers, side="right") - 1
        for number, file in zip(numbers.tolist(), which.tolist(), strict=True):
            place = number - int(self._edges[file])
            yield arrow_row(self._tables[file], place, f"{self.paths[file].name}:{place}", self.options)


def _files_of(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: holds a selection of rows; write it out with dataset.flatten_indices() before save_to_disk"
        )
    return [folder / entry["filename"] for entry in state["_data_files"]]


def _map(path: Path) -> pa.Table:
    with _explained(path):
        source = pa.memory_map(str(path))
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()


def arrow_row(table: pa.Table, place: int, source: str, options: SourceOptions) -> Row:
    """One row of an Arrow table. Columns that hold bytes have no place in a .json member and are left out of it."""
    record = {name: table.column(name)[place].as_py() for name in table.column_names}
    image, captions, columns = split_columns(record, options)
    kept = {name: value for name, value in columns.items() if not _holds_bytes(value)}
    return Row(source, image_value(image), captions, kept)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_bytes(item) for item in value.values())
    return isinstance(value, bytes)


def _footer_hash(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        file.seek(-(size + 8), 2)
        return hash_text(file.read().hex())


class _explained:
    """Turns Arrow's errors into one line that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (pa.ArrowException, OSError)) and not isinstance(error, FileNotFoundError):
            raise UserError(
                f"{self._path}: not readable ({' '.join(str(error).split())[:200]}); fetch or write it again"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self._path}: no such file; copy the whole dataset") from error
