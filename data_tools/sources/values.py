"""Converts a record of any table to a `Row`.

An image is bytes, a path, a URL, base64, a ``data:`` URL, or Hugging Face's {"bytes", "path"}. A caption is text or a
list of texts. A name with dots reaches into structs, maps, lists and JSON texts: ``d.en``, ``images.0``,
``sentences.raw`` (of every item of a list). All other columns go to the .json member, as far as JSON can represent
them.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from contextlib import suppress
from typing import Any
from urllib.parse import unquote_to_bytes

from data_tools.samples.reject import Reject
from data_tools.sources.base import Row, SourceOptions, fields_of, replace_fields

MAX_DEPTH = 100
"""Deepest nesting of lists and structs; more could exhaust the interpreter's stack."""
_SIMPLE = (str, int, bool, type(None))
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*\Z")
_PICTURES = ("/9j/", "_9j_", "iVBO", "UklG", "R0lG", "Qk", "SUkq", "TU0A", "AAAA", "/0//")
"""The first characters of a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 in base64. A path of 64 characters
without a dot hardly starts with them."""


class RowMaker:
    """Makes rows from records as the options say; prepares once what is the same for every row."""

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self._image = options.image or ""
        self._used = {options.image, *options.captions}
        self._caption = options.captions[0] if len(options.captions) == 1 and not options.templates else None

    def __call__(self, where: str, record: dict[str, Any], names: dict[str, Any] | None = None) -> Row:
        """The row of a record found at ``where``. ``names`` override the record's values in templates: the class names
        of numeric labels."""
        try:
            image = picture_of(self._image, reach(record, self._image)) if self._image else None
            caption = record.get(self._caption) if self._caption is not None else None
            captions = [caption] if caption.__class__ is str else captions_of(record, self._options, names)
            columns = {}
            for name, value in record.items():
                if name in self._used:
                    continue
                if value.__class__ in _SIMPLE or (value.__class__ is float and math.isfinite(value)):
                    columns[name] = value
                else:
                    with suppress(Unfit):  # leaves the column out
                        columns[name] = plain(value)
        except Reject as reject:
            return Row(where, None, [], fault=reject.reason, detail=reject.path)
        return Row(where, image, captions, columns)


def to_row(where: str, record: dict[str, Any], options: SourceOptions, names: dict[str, Any] | None = None) -> Row:
    """One row; for many, keep a `RowMaker`."""
    return RowMaker(options)(where, record, names)


def captions_of(
    record: dict[str, Any], options: SourceOptions, names: dict[str, Any] | None = None
) -> list[str | None]:
    """The texts of the caption columns, then one per template. Raises Reject for a value that is not text."""
    captions: list[str | None] = []
    for name in options.captions:
        value = reach(record, name)
        captions.extend(_text(name, item) for item in (value if isinstance(value, list) else [value]))
    if options.templates:
        known = {**record, **names} if names else record
        captions.extend(fill(template, known) for template in options.templates)
    return captions


def _text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Reject("not_utf8") from None
    if isinstance(value, dict):
        fields = ", ".join(map(str, value))
        remedy = f"name one of them, such as --caption {name}.{next(iter(value), 'FIELD')}"
        raise Reject("caption_type", f"column {name!r} holds structs with the fields {fields}; {remedy}")
    kind = _kind(value)
    template = f"--caption-template 'a photo, {name} {{{name}}}'"
    raise Reject("caption_type", f"column {name!r} holds {kind}, not text; to make captions from it use {template}")


def _kind(value: Any) -> str:
    kinds = {
        bool: "booleans",
        int: "integers",
        float: "floating-point numbers",
        list: "lists of lists",
        tuple: "tuples",
    }
    return kinds.get(type(value), f"values of type {type(value).__name__}")


_SPECIAL = (*_PICTURES, "d", "D")
"""First characters of a text that may be an image instead of a path."""


def picture_of(name: str, value: Any) -> str | bytes | None:
    """The image in a column: its bytes, or a path or URL. Raises Reject for anything else."""
    if isinstance(value, dict):
        if not value.keys() & {"bytes", "path"}:
            fields = ", ".join(map(str, value))
            remedy = f"name one of them, such as --image {name}.{next(iter(value), 'FIELD')}"
            raise Reject("image_type", f"column {name!r} holds structs with the fields {fields}; {remedy}")
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if value.__class__ is str and not value.startswith(_SPECIAL):
        return str(value)
    if isinstance(value, list):
        raise Reject("image_type", f"column {name!r} holds lists; --image {name}.0 takes the first of each")
    if not isinstance(value, str):
        raise Reject("image_type", f"column {name!r} holds {_kind(value)}, not images or paths")
    if value[:5].lower() == "data:":
        return _data_url(value)
    if value.startswith(_PICTURES) and _BASE64.match(value):
        return _base64(value)
    return value


def _data_url(url: str) -> bytes:
    """The bytes of a data: URL (RFC 2397)."""
    head, comma, data = url.partition(",")
    if not comma:
        raise Reject("image_encoding")
    return _base64(data) if head.rstrip().lower().endswith(";base64") else unquote_to_bytes(data)


def _base64(text: str) -> bytes:
    """Decodes base64 in either alphabet, with or without padding and line breaks."""
    digits = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Reject("image_encoding") from None


def reach(record: dict[str, Any], name: str) -> Any:
    """The value of a column, or inside one: the whole name is tried first, then the parts between its dots. None if
    there is no such value."""
    if name in record or "." not in name:
        return record.get(name)
    head, _, rest = name.partition(".")
    while head not in record:
        more, dot, rest = rest.partition(".")
        if not dot:
            return None
        head = f"{head}.{more}"
    return _inside(record[head], rest.split("."))


def _inside(value: Any, steps: list[str]) -> Any:
    for number, step in enumerate(steps):
        if isinstance(value, str):
            value = _parsed(value)
        if is_map(value):
            value = dict(value)
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if len(step) < 10 and int(step) < len(value) else None
        elif isinstance(value, list):
            return [_inside(item, steps[number:]) for item in value]
        else:
            return None
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def fill(template: str, record: dict[str, Any]) -> str | None:
    """``template`` with every {NAME} replaced by that column's text; None if one of them is null."""
    values = {}
    for name in fields_of(template):
        value = reach(record, name)
        if value is None:
            return None
        if isinstance(value, (dict, list, bytes)):
            raise Reject("caption_type", f"{{{name}}} of {template!r} holds a {type(value).__name__}, not a text")
        values[name] = str(value)
    return replace_fields(template, values)


def is_map(value: Any) -> bool:
    """Whether ``value`` is an Arrow map with text keys: a list of (key, value)."""
    return isinstance(value, list) and bool(value) and all(type(i) is tuple and isinstance(i[0], str) for i in value)


class Unfit(Exception):
    """A value that JSON cannot represent: bytes, or too deep nesting."""


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as strict JSON: NaN and infinities become null, maps objects; dates, decimals and other objects become
    text. Raises Unfit."""
    if value.__class__ in _SIMPLE:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes) or depth > MAX_DEPTH:
        raise Unfit
    if isinstance(value, list) and value and type(value[0]) is tuple and is_map(value):
        value = dict(value)
    if isinstance(value, dict):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [item if item.__class__ in _SIMPLE else plain(item, depth + 1) for item in value]
    return str(value)
