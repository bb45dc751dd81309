"""CSV, TSV and JSONL: text files of one row per line, read at any byte offset.

The offsets of all rows are found once (8 bytes per row); workers then read any row without the file in memory. Quoted
fields may contain line breaks, so a file with quotes is split by the ``csv`` module, not at its line breaks.
"""

from __future__ import annotations

import codecs
import csv
import json
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.io.errors import UserError
from data_tools.samples.reject import fault_of
from data_tools.sources.base import Problem, Row, SourceOptions, hash_file, require_columns, with_caption
from data_tools.sources.dialect import (
    Dialect,
    check_options,
    find_dialect,
    find_encoding,
    read_fields,
    refuse_other_encoding,
)
from data_tools.sources.unpacked import Copy, transcode, unpack
from data_tools.sources.values import RowMaker

csv.field_size_limit(2**31 - 1)  # long captions are cut later
_MAX_LINES = 10_000
"""A quoted field over more lines than this is a stray quote."""


class TableSource:
    """One CSV, TSV or JSONL file."""

    def __init__(self, path: Path, kind: str, options: SourceOptions, caption_names: tuple[str, ...] = ()) -> None:
        self.path, self.kind, self.options = path, kind, options
        self.problems: list[Problem] = []
        self.classes: list[str] = []
        self._file: mmap.mmap | None = None
        check_options(options)
        self._copies: list[Copy] = []
        start = self._open()
        self._dialect = Dialect("") if kind == "jsonl" else find_dialect(self._text, start, kind, options)
        starts, self._lines = self._split(start)
        self.columns = self._read_columns(starts)
        options = self.options = with_caption(options, self.columns, caption_names)
        if kind != "jsonl":
            self._require_columns()
        elif options.image is None or not (options.captions or options.templates):
            raise UserError(f"{path}: say which keys hold the image and the caption: --image KEY --caption KEY")
        first = 0 if kind == "jsonl" or options.columns else 1
        self._starts, self._lines = starts[first:], self._lines[first:]
        self.blocks = [len(self._starts) - 1]

    def _open(self) -> int:
        """Sets ``_text``, a file in UTF-8 (the table, or a copy), and returns the offset of its text."""
        self._text = self.path
        if copy := unpack(self.path):
            self._copies.append(copy)
            self._text = copy.path
        encoding, start = find_encoding(self._text, self.options)
        if codecs.lookup(encoding).name != "utf-8":
            self._copies.append(transcode(self._text, encoding))
            self._text, start = self._copies[-1].path, 0
        else:
            refuse_other_encoding(self.path, self._text)
        return start

    def _require_columns(self) -> None:
        try:
            require_columns(str(self.path), self.columns, self.options)
        except UserError as error:
            name = "tabs" if self._dialect.delimiter == "\t" else repr(self._dialect.delimiter)
            raise UserError(f"{error}; fields are split at {name} (--delimiter names another)") from None

    def fingerprint(self) -> str:
        return hash_file(self.path)

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        data, make = self._map(), RowMaker(self.options)
        for number in numbers.tolist():
            raw = data[int(self._starts[number]) : int(self._starts[number + 1])]
            source = f"{self.path.name}:{int(self._lines[number])}"
            record = self._parse(raw)
            if isinstance(record, str):
                yield Row(source, None, [], fault=record)
                continue
            yield make(source, record)

    def _parse(self, raw: bytes) -> dict[str, Any] | str:
        """The row, or the reason why it is rejected."""
        try:
            text = raw.decode("utf-8")
            if self.kind == "jsonl":
                record = json.loads(text)
                return record if isinstance(record, dict) else "row_malformed"
            fields: list[str] = next(self._reader([text]), [])
        except ValueError as error:
            return fault_of(error)
        except RecursionError:
            return "not_json"
        except csv.Error:  # a carriage return outside of quotes
            return "row_malformed"
        return dict(zip(self.columns, fields, strict=True)) if len(fields) == len(self.columns) else "wrong_fields"

    def _reader(self, lines: Any) -> Any:
        return read_fields(lines, self._dialect.delimiter, self.options.quotes)

    def _map(self) -> mmap.mmap | bytes:
        if self._file is None:
            with open(self._text, "rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _split(self, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(Offset of each row, and the end of the last one [n + 1]; number of its first line, from 1 [n]), without
        blank lines."""
        size = self._text.stat().st_size
        if size <= start:
            raise UserError(f"{self.path}: the file is empty")
        ends = _line_ends(self._text, size)
        begins = np.concatenate([[start], ends[:-1]]).astype(np.int64)
        lines = np.arange(1, len(begins) + 1)
        if self.kind != "jsonl" and self.options.quotes and self._has_quotes():
            rows = self._quoted_rows()
            begins, lines = begins[rows], lines[rows]
        edges = np.concatenate([begins, [size]])
        data = self._map()
        short = np.flatnonzero(np.diff(edges) <= 2)
        blank = short[[not data[int(edges[i]) : int(edges[i + 1])].strip() for i in short]] if short.size else short
        # A blank line becomes part of the row before it, where both parsers ignore it; leading ones are dropped.
        keep = np.ones(len(begins), bool)
        keep[blank] = False
        keep[0] &= not self._dialect.has_separator_line
        return np.concatenate([begins[keep], [size]]), lines[keep]

    def _has_quotes(self) -> bool:
        return self._map().find(b'"') >= 0

    def _quoted_rows(self) -> NDArray[np.int64]:
        """The number of each row's first line, from 0."""
        starts, last = [], 0
        with open(self._text, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            reader = self._reader(file)
            while True:
                with suppress(csv.Error):  # `_parse` will reject this malformed row; the reader continues behind it
                    if next(reader, None) is None:
                        break
                if reader.line_num - last > _MAX_LINES:
                    remedy = "--no-quotes reads quotes as ordinary characters"
                    raise UserError(
                        f"{self.path}: a quote opened on line {last + 1} is not closed for {_MAX_LINES} lines; {remedy}"
                    )
                starts.append(last)
                last = reader.line_num
        return np.array(starts, np.int64)

    def _read_columns(self, starts: NDArray[np.int64]) -> list[str]:
        if self.kind == "jsonl":
            first = self._parse(self._map()[int(starts[0]) : int(starts[1])]) if len(starts) > 1 else {}
            return list(first) if isinstance(first, dict) else []
        if self.options.columns:
            return list(self.options.columns)
        if len(starts) < 2:
            raise UserError(f"{self.path}: all lines are blank")
        raw = self._map()[int(starts[0]) : int(starts[1])]
        try:
            return next(self._reader([raw.decode("utf-8")]))
        except csv.Error as error:
            raise UserError(
                f"{self.path}: line {int(self._lines[0])}, the header of column names, is not readable ({error}); "
                "if the file's lines end in carriage returns alone, convert it: tr '\\r' '\\n'"
            ) from None
        except (UnicodeDecodeError, StopIteration):
            raise UserError(f"{self.path}: the first line is not a UTF-8 header of column names") from None


def _line_ends(path: Path, size: int) -> NDArray[np.int64]:
    """The offset after every line break, and the size of the file if it does not end in one."""
    found, offset = [], 0
    with open(path, "rb") as file:
        while piece := file.read(16 << 20):
            found.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == 10) + (offset + 1))
            offset += len(piece)
    ends = np.concatenate(found) if found else np.zeros(0, np.int64)
    return ends if len(ends) and ends[-1] == size else np.append(ends, size)
