"""What every input looks like to the writer: numbered rows that can be read in any order."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.io.errors import UserError
from data_tools.io.remote import require_backend
from data_tools.samples.reject import Reject


class Problem(NamedTuple):
    """Something left out while the input was listed."""

    key: str
    reason: str
    source: str


@dataclass(slots=True)
class Row:
    """One picture with its captions, not yet looked at."""

    source: str
    """Where it stands in the input: "pairs.csv:17", "00003.tar:000030017"."""
    image: str | bytes | None
    """A path or URL, or the picture itself."""
    captions: list[Any]
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column, for the .json member."""
    fault: str | None = None
    """Why this row cannot be used, where that is clear already."""


class Source(Protocol):
    """An input, opened and counted. Rows are numbered 0 .. num_rows - 1 as they stand in it."""

    blocks: list[int]
    """Rows in each part that must be read as a whole (a Parquet row group); one number where any row can be read
    alone."""
    columns: list[str]
    """Names of all columns, as far as they are known beforehand."""
    problems: list[Problem]

    def fingerprint(self) -> str:
        """Changes whenever a row may have; part of the plan hash."""
        ...

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        """The rows with these numbers, in this order."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """How an input is read; part of the plan hash."""

    image: str | None = None
    """Column of the picture: a path, a URL that fsspec opens, or the bytes themselves."""
    captions: tuple[str, ...] = ()
    """Columns of captions, in this order; a column may hold a list."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a table without a header line."""
    quotes: bool = True
    """Whether double quotes enclose fields of a CSV or TSV file."""
    images: str | None = None
    """Folder or URL that relative paths start from; by default that of the file they stand in."""


def split_columns(record: dict[str, Any], options: SourceOptions) -> tuple[Any, list[Any], dict[str, Any]]:
    """(Image, captions, every other column) of one record."""
    captions: list[Any] = []
    for name in options.captions:
        value = record.get(name)
        captions.extend(value if isinstance(value, list) else [value])
    used = {options.image, *options.captions}
    return (
        record.get(options.image or ""),
        captions,
        {name: value for name, value in record.items() if name not in used},
    )


def require_columns(place: str, columns: list[str], options: SourceOptions) -> None:
    """Raises UserError, naming the columns there are, when the picture's or a caption's is not among them, or a name is
    there twice."""
    for flag, what, names in (
        ("--image", "picture", (options.image,)),
        ("--caption", "caption", options.captions or (None,)),
    ):
        for name in names:
            if name is None:
                raise UserError(
                    f"{place}: say which column holds the {what}: {flag} COLUMN; there are: {', '.join(columns)}"
                )
            if name not in columns:
                raise UserError(f"{place}: no column {name!r} ({flag}); there are: {', '.join(columns)}")
    refuse_twice(place, columns)


def refuse_twice(place: str, columns: list[str]) -> None:
    """Raises UserError for a name of two columns, of which one would be lost. Those without a name are a spreadsheet's
    empty ones."""
    for name, count in Counter(columns).items():
        if name and count > 1:
            raise UserError(f"{place}: {count} columns are called {name!r}; rename or remove all but one")


def image_value(value: Any) -> str | bytes | None:
    """What an image column may hold: bytes, a path, or Hugging Face's {"bytes", "path"}."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, (str, bytes)) else None


def read_image(row: Row, root: str, max_bytes: int) -> bytes:
    """The bytes of a row's picture; relative paths start at ``root``. Raises Reject."""
    image = row.image
    if isinstance(image, bytes):
        return image
    if not image:
        raise Reject("image_missing")
    path = (
        image if "://" in image else os.path.join(root, image) if "://" not in root else f"{root.rstrip('/')}/{image}"
    )
    try:
        if "://" in path:
            with fsspec.open(path, "rb") as remote:
                data: bytes = remote.read(max_bytes + 1)
        else:
            with open(path, "rb", buffering=0) as file:
                data = _read_all(file, max_bytes)
    except FileNotFoundError:
        raise Reject("file_missing", path) from None
    except ImportError:  # not the row's fault, and the next one would have it too
        require_backend(path)
        raise
    except (OSError, ValueError):  # ValueError: a path with a NUL character
        raise Reject("file_unreadable", path) from None
    if len(data) > max_bytes:
        raise Reject("file_too_large")
    return data


def _read_all(file: Any, max_bytes: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise Reject("file_too_large")
    return bytes(file.read(size)) if size else bytes(file.read(max_bytes + 1))


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """A file in pieces of a few megabytes."""
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            yield piece


def hash_file(path: str | Path) -> str:
    """xxh3_128 of a file, read in pieces."""
    digest = xxhash.xxh3_128()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def hash_text(*parts: Any) -> str:
    """xxh3_128 of anything that JSON can say."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())
