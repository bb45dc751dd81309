"""The interface of inputs: numbered rows that can be read in any order."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.io.errors import UserError
from data_tools.io.remote import require_backend
from data_tools.samples.reject import Reject

_FIELD = re.compile(r"\{([^{}]+)\}")
_WEB = re.compile(r"(^|::)https?://", re.IGNORECASE)


class Problem(NamedTuple):
    """An item that was left out while the input was listed."""

    key: str
    reason: str
    source: str


class Stored(NamedTuple):
    """An image inside an archive, read on demand."""

    name: str
    read: Callable[[int], bytes]
    """``read(limit)``: the image's bytes. Raises Reject if there are more than ``limit``."""


@dataclass(slots=True)
class Row:
    """One image with its captions, not checked yet."""

    source: str
    """Its place in the input: "pairs.csv:17", "00003.tar:000030017"."""
    image: str | bytes | Stored | None
    """A path or URL, the bytes, or a place in an archive."""
    captions: Sequence[str | None]
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column, for the .json member."""
    fault: str | None = None
    """Why this row cannot be used, if that is known already."""
    detail: str | None = None
    """What was found instead, for people."""


class Source(Protocol):
    """An input, opened and counted. Rows are numbered 0 .. num_rows - 1 in the order of the input."""

    blocks: list[int]
    """Rows in each part that must be read as a whole (a Parquet row group); a single number if any row can be read by
    itself."""
    columns: list[str]
    """Names of all columns, as far as known before reading."""
    problems: list[Problem]
    classes: list[str]
    """Class names, indexed by "cls" of a row's columns, if the input has classes."""

    def fingerprint(self) -> str:
        """Changes whenever a row may have changed; part of the plan hash."""
        ...

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        """The rows with these numbers, in this order."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """How an input is read; part of the plan hash."""

    image: str | None = None
    """Column of the image: a path, a URL that fsspec opens, or bytes."""
    captions: tuple[str, ...] = ()
    """Columns of captions, in order; a value may be a list."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a table without a header line."""
    quotes: bool = True
    """Whether double quotes enclose fields of a CSV or TSV file."""
    images: str | None = None
    """Folder or URL that relative paths start from; by default the folder of the table."""
    templates: tuple[str, ...] = ()
    """Caption templates, in which {NAME} is a column and {class} the folder of an image."""
    delimiter: str | None = None
    """Of a CSV or TSV file; None detects it."""
    encoding: str | None = None
    """Of a CSV, TSV or JSONL file; None: UTF-8, or UTF-16 if the file has its byte-order mark."""


def require_columns(place: str, columns: list[str], options: SourceOptions) -> None:
    """Raises UserError, with the names of all columns, if the image's or a caption's column is missing or two columns
    have one name. A name with dots may reach into a column."""
    known = ", ".join(columns)
    if options.image is None:
        raise UserError(f"{place}: say which column holds the image: --image COLUMN; there are: {known}")
    if not (options.captions or options.templates):
        raise UserError(f"{place}: say which column holds the caption: --caption COLUMN; there are: {known}")
    wanted = [("--image", options.image), *(("--caption", name) for name in options.captions)]
    wanted += [("--caption-template", name) for text in options.templates for name in fields_of(text)]
    for flag, name in wanted:
        if not has_column(columns, name):
            raise UserError(f"{place}: no column {name!r} ({flag}); there are: {known}")
    refuse_twice(place, columns)


def with_caption(options: SourceOptions, columns: Sequence[str], names: tuple[str, ...]) -> SourceOptions:
    """The options; if they name no caption, with the first of ``names`` that is a column."""
    found = next((name for name in names if name in columns), None)
    return options if options.captions or options.templates or not found else replace(options, captions=(found,))


def fields_of(template: str) -> list[str]:
    """The names in the braces of a caption template."""
    return _FIELD.findall(template)


def replace_fields(template: str, values: dict[str, str]) -> str:
    """The template with its names replaced by ``values``, which must have all of them."""
    return _FIELD.sub(lambda found: values[found[1]], template)


def has_column(columns: Sequence[str], name: str) -> bool:
    """Whether ``name`` is a column or reaches into one."""
    steps = name.split(".")
    return any(".".join(steps[:count]) in columns for count in range(len(steps), 0, -1))


def refuse_twice(place: str, columns: list[str]) -> None:
    """Raises UserError if two columns have one name, since one would be lost. Empty columns of spreadsheets have no
    name and are ignored."""
    for name, count in Counter(columns).items():
        if name and count > 1:
            raise UserError(f"{place}: {count} columns are called {name!r}; rename or remove all but one")


def is_web_address(image: object) -> bool:
    """Whether a table names an image on the web. These are never fetched: tables are not trusted."""
    return isinstance(image, str) and "://" in image and _WEB.search(image) is not None


def read_image(row: Row, root: str, max_bytes: int) -> bytes:
    """The bytes of a row's image; relative paths start from ``root``. Raises Reject."""
    image = row.image
    if isinstance(image, Stored):
        return image.read(max_bytes)
    if isinstance(image, bytes):
        if len(image) > max_bytes:
            raise Reject("file_too_large")
        return image
    if not image:
        raise Reject("image_missing")
    if is_web_address(image):
        raise Reject("web_address", image)
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
    except ImportError:  # every row would fail: end the run
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
    """Yields a file in pieces of a few megabytes."""
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            yield piece


def hash_file(path: str | Path) -> str:
    """xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def hash_text(*parts: Any) -> str:
    """xxh3_128 of any JSON values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())
