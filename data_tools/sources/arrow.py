"""Parquet files, read by row group, and Hugging Face datasets on disk (Arrow files), memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.io.errors import UserError
from data_tools.sources.base import Problem, Row, SourceOptions, hash_text, require_columns, with_caption
from data_tools.sources.values import RowMaker

_CACHE_BYTES = 512 << 20


class ParquetSource:
    """One or several Parquet files of one schema. A row group is a block: it is read as a whole, for one or a few
    shards."""

    def __init__(self, paths: list[Path], options: SourceOptions, caption_names: tuple[str, ...] = ()) -> None:
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
                if self.blocks[-1] < 0:
                    raise UserError(f"{path}: a damaged footer ({self.blocks[-1]} rows); fetch or write it again")
                self._groups.append((number, group))
            with _explained(path):
                schema = meta.schema.to_arrow_schema()
            labels = class_labels(schema)
            if number == 0:
                self.columns, self._labels, self.classes = list(schema.names), labels, labels.names
                options = self.options = with_caption(options, self.columns, caption_names)
            require_columns(str(path), [*schema.names, *labels.added(schema.names)], options)
        self._print = hash_text(footers)
        self._make = RowMaker(self.options)
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
            tables[block] = _movable(self._read(block)).take(pa.array(numbers[mine] - self._edges[block]))
            places[mine] = np.arange(int(mine.sum()))
        for number, block, place in zip(numbers.tolist(), which.tolist(), places.tolist(), strict=True):
            file, group = self._groups[block]
            line = number - int(self._edges[block - group])
            yield arrow_row(tables[block], place, f"{self.paths[file].name}:{line}", self._make, self._labels)

    def _read(self, block: int) -> pa.Table:
        # A shard smaller than a row group reads the same group again: keep the last one, unless it has images.
        if self._cached is None or self._cached[0] != block:
            file, group = self._groups[block]
            with _explained(self.paths[file]):
                table = pq.ParquetFile(self.paths[file]).read_row_group(group, use_threads=False)
            if table.num_rows != self.blocks[block]:
                raise UserError(f"{self.paths[file]}: its number of rows differs from its footer's; fetch it again")
            if table.nbytes > _CACHE_BYTES:
                return table
            self._cached = (block, table)
        return self._cached[1]


class ArrowSource:
    """A folder written by ``Dataset.save_to_disk`` of Hugging Face datasets, or single Arrow files; memory-mapped."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.options = path, options
        self.problems: list[Problem] = []
        self.paths = [path] if path.is_file() else _files_of(path)
        self._tables = [_map(file) for file in self.paths]
        self.columns = list(self._tables[0].column_names)
        self._labels = class_labels(self._tables[0].schema)
        self.classes = self._labels.names
        require_columns(str(path), [*self.columns, *self._labels.added(self.columns)], options)
        self._make = RowMaker(options)
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
            yield arrow_row(self._tables[file], place, f"{self.paths[file].name}:{place}", self._make, self._labels)


def _files_of(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder}/state.json: not the state of a Hugging Face dataset ({error!r}); save it again"
        ) from None
    if not names:
        raise UserError(f"{folder}: a dataset without files; save it again")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: a selection of rows; call dataset.flatten_indices() before save_to_disk")
    return [folder / name for name in names]


def _map(path: Path) -> pa.Table:
    with _explained(path):
        source = pa.memory_map(str(path))
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()


class Labels(NamedTuple):
    """The only column of type ClassLabel (numbers with names) in Hugging Face's features."""

    column: str
    names: list[str]

    def added(self, columns: list[str]) -> list[str]:
        """The columns that it adds to rows."""
        return [name for name in ("cls", "class") if self.names and name not in columns]

    def of(self, record: dict[str, Any]) -> dict[str, Any]:
        """``cls`` and ``class`` of a record, unless it has columns of these names."""
        number = record.get(self.column)
        known = isinstance(number, int) and 0 <= number < len(self.names)
        found = {"cls": number, "class": self.names[int(number or 0)]} if known else {"cls": None, "class": None}
        return {name: value for name, value in found.items() if name not in record}


def class_labels(schema: pa.Schema) -> Labels:
    """The labels in the schema's "huggingface" metadata; none if there are none, or several such columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = [
            Labels(column, [str(name).replace("_", " ") for name in about["names"]])
            for column, about in features.items()
            if isinstance(about, dict) and about.get("_type") == "ClassLabel" and column in schema.names
        ]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return Labels("", [])
    return found[0] if len(found) == 1 else Labels("", [])


def arrow_row(table: pa.Table, place: int, source: str, make: RowMaker, labels: Labels) -> Row:
    """One row of an Arrow table. Columns of bytes are left out of the .json member."""
    record = {name: python_value(column[place]) for name, column in zip(table.column_names, table.columns, strict=True)}
    if not labels.names:
        return make(source, record)
    record |= labels.of(record)
    return make(source, record, {labels.column: record["class"]})


def python_value(scalar: pa.Scalar) -> Any:
    """The value as a Python object: times as text, because Python's have no nanoseconds and end with the year 9999;
    None if it is damaged."""
    try:
        if type(scalar) in (pa.StringScalar, pa.Int64Scalar, pa.BinaryScalar, pa.DoubleScalar):
            return scalar.as_py()
        return scalar.cast(target).as_py() if (target := _as_text(scalar.type)) else scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return None


@lru_cache(maxsize=1024)
def _as_text(kind: pa.DataType) -> pa.DataType | None:
    """The type with text in place of dates and times, at any depth; None if it has neither."""
    if pa.types.is_interval(kind):
        return None
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        inner = [_as_text(field.type) for field in kind]
        return pa.struct([(f.name, t or f.type) for f, t in zip(kind, inner, strict=True)]) if any(inner) else None
    if pa.types.is_map(kind):
        key, item = _as_text(kind.key_type), _as_text(kind.item_type)
        return pa.map_(key or kind.key_type, item or kind.item_type) if key or item else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner_type = _as_text(kind.value_type)
        return pa.list_(inner_type) if inner_type else None
    return None


def _movable(table: pa.Table) -> pa.Table:
    """The table without types that Arrow cannot take rows of yet: views and run-end encoding."""
    for number, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
            text = pa.types.is_string_view(column.type)
            table = table.set_column(number, name, column.cast(pa.large_string() if text else pa.large_binary()))
        elif pa.types.is_run_end_encoded(column.type):
            table = table.set_column(number, name, pc.run_end_decode(column))
    return table


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
        damaged = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last: names of columns that are not UTF-8
        if isinstance(error, damaged) and not isinstance(error, FileNotFoundError):
            raise UserError(
                f"{self._path}: not readable ({' '.join(str(error).split())[:200]}); fetch or write it again"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self._path}: no such file; copy the whole dataset") from error
