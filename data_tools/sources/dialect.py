"""Detects a table's encoding and delimiter from its first lines."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.io.errors import UserError
from data_tools.sources.base import SourceOptions, fields_of, has_column

DELIMITERS = {"csv": ",;\t|", "tsv": "\t,;|"}
"""Tried in this order; the first one wins a tie."""
_SAMPLE = 1 << 18
_ROWS = 50
_SEPARATOR = re.compile(r'"?sep=(.)"?\r?\Z')
"""A first line that Excel writes and reads."""
_MARKS = {  # byte-order marks, longest first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MOST_BAD = 0.1
"""If more than this share of rows is not UTF-8, the file is in another encoding."""


class Dialect(NamedTuple):
    """The delimiter, and whether the first line is only a "sep=" line that names it."""

    delimiter: str
    has_separator_line: bool = False


def check_options(options: SourceOptions) -> None:
    """Raises UserError for an invalid delimiter or encoding."""
    if options.delimiter is not None and (len(options.delimiter) != 1 or options.delimiter in '"\r\n'):
        raise UserError(f"--delimiter: {options.delimiter!r} is not one character such as ';' (tab is for tabs)")
    if options.encoding is not None:
        try:
            codecs.getincrementaldecoder(options.encoding)
            b"a".decode(options.encoding, "replace")
        except (LookupError, TypeError, ValueError):
            raise UserError(f"--encoding: no encoding {options.encoding!r}; such as utf-8, cp1252, utf-16") from None


def find_encoding(path: Path, options: SourceOptions) -> tuple[str, int]:
    """(Encoding, bytes of the byte-order mark). A mark, or NULs in every other byte, decides; otherwise it is
    --encoding, or UTF-8."""
    with open(path, "rb") as file:
        head = file.read(64)
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    if options.encoding is None and len(head) >= 4:
        if not any(head[1::2]) and all(head[::2]):
            return "utf-16-le", 0
        if not any(head[::2]) and all(head[1::2]):
            return "utf-16-be", 0
    return options.encoding or "utf-8", 0


def find_dialect(path: Path, start: int, kind: str, options: SourceOptions) -> Dialect:
    """The delimiter of the table whose text starts at byte ``start``: from --delimiter or a "sep=" line, else the one
    that splits the first rows into the named columns, else into equally many fields."""
    with open(path, "rb") as file:
        file.seek(start)
        raw = file.read(_SAMPLE)
    whole = len(raw) < _SAMPLE
    text = raw.decode("utf-8", "replace")
    first = text.partition("\n")[0]
    stated = _SEPARATOR.match(first)
    if stated:
        return Dialect(options.delimiter or stated[1], True)
    if options.delimiter:
        return Dialect(options.delimiter)
    candidates = DELIMITERS[kind]
    return Dialect(max(candidates, key=lambda one: _score(text, whole, one, options)))


def _score(text: str, whole: bool, delimiter: str, options: SourceOptions) -> tuple[bool, float]:
    """(Whether the named columns are found, the share of rows with as many fields as the first, if it has several)."""
    rows: list[list[str]] = []
    try:
        for row in read_fields(io.StringIO(text, newline=""), delimiter, options.quotes):
            rows += [row] if row else []
            if len(rows) > _ROWS:
                break
    except csv.Error:  # a carriage return outside of quotes: what was read before counts
        pass
    if len(rows) > 1 and (len(rows) > _ROWS or not whole):
        rows.pop()
    if not rows:
        return False, 0.0
    if options.columns:
        width, fits = len(options.columns), len(rows[0]) == len(options.columns)
    else:
        names = [options.image, *options.captions, *(name for text in options.templates for name in fields_of(text))]
        width, fits = len(rows[0]), all(has_column(rows[0], name) for name in names if name)
    return fits and width > 1, sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0


def refuse_other_encoding(path: Path, text: Path) -> None:
    """Raises UserError if many of the first lines of the file ``text`` are not UTF-8. Which 8-bit encoding it is cannot
    be told from the bytes, and a wrong guess would silently change captions."""
    with open(text, "rb") as file:
        raw = file.read(_SAMPLE)
    lines = [line for line in raw.split(b"\n")[:1000] if line]
    lines = lines[:-1] if len(raw) == _SAMPLE and len(lines) > 1 else lines
    bad = 0
    for line in lines:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            bad += 1
    if bad > _MOST_BAD * len(lines):
        raise UserError(
            f"{path}: {bad} of the first {len(lines)} lines are not UTF-8; add --encoding cp1252 (Excel in Western "
            f"Europe; cp1250 in Central Europe, cp1251 in Cyrillic, shift_jis, gb18030 ...)"
        )


def read_fields(lines: Iterable[str], delimiter: str, quotes: bool) -> Any:
    """``csv.reader`` over lines of text."""
    if quotes:
        return csv.reader(lines, delimiter=delimiter)
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
