"""Walks the headers of any tar: yields its regular files, reports damage and continues behind it where possible.

Python's ``tarfile`` and every streaming reader stop silently at the first bad header or end marker. Here a bad header,
a cut file, a second archive behind the first, links and unsafe names are each a `TarProblem` with an offset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
_ZERO = bytes(BLOCK)
_WINDOW = 1 << 20
_MAX_META = 1 << 20
"""Largest pax or long-name record that is read: a forged size must not cost memory."""


class Member(NamedTuple):
    """A regular file in a tar; ``offset`` and ``size`` of its data are in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarProblem:
    """Damage in a tar at byte ``offset``. ``reason`` is a key of REASONS; ``name`` is the affected member or sample, if
    known."""

    offset: int
    reason: str
    name: str = ""


def walk(path: str | Path, problems: list[TarProblem]) -> Iterator[Member]:
    """Yields the regular files of a tar in order and appends what is wrong to ``problems``. Raises OSError if the file
    cannot be read."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _Walk(descriptor, os.fstat(descriptor).st_size, problems).members()
    finally:
        os.close(descriptor)


class _Walk:
    def __init__(self, descriptor: int, length: int, problems: list[TarProblem]) -> None:
        self.descriptor, self.length, self.problems = descriptor, length, problems
        self.ended = False  # an end marker has been seen since the last member

    def members(self) -> Iterator[Member]:
        at = 0
        long_name: str | None = None
        pax: dict[str, str] = {}
        while at + BLOCK <= self.length:
            header = os.pread(self.descriptor, BLOCK, at)
            if header == _ZERO:
                self.ended, at = True, self._skip_zeros(at)
                continue
            size = _parse_size(header) if _checksum_is_right(header) else None
            if size is None:
                self.problems.append(TarProblem(at, "bad_header"))
                at, long_name, pax = self._next_header(at + BLOCK), None, {}
                continue
            if self.ended:
                self.problems.append(TarProblem(at, "concatenated"))
                self.ended = False
            kind = header[156:157]
            data = at + BLOCK
            if kind in b"07\0" and "size" in pax and pax["size"].isdigit():
                size = int(pax["size"])
            if data + size > self.length:
                self.problems.append(
                    TarProblem(at, "cut_in_member", long_name or pax.get("path") or _parse_name(header))
                )
                return
            at = data + (size + BLOCK - 1) // BLOCK * BLOCK
            if kind == b"L":
                long_name = self._text(data, size).rstrip("\0")
            elif kind == b"x":
                pax = _parse_pax(os.pread(self.descriptor, min(size, _MAX_META), data))
            elif kind not in b"gK":
                name = long_name or pax.get("path") or _parse_name(header)
                long_name, pax = None, {}
                if self._wanted(kind, name, data):
                    yield Member(name, data, size)
        if not self.ended:
            self.problems.append(TarProblem(min(at, self.length), "no_end_marker"))

    def _wanted(self, kind: bytes, name: str, data: int) -> bool:
        if kind == b"5" or (kind in b"07\0" and name.endswith("/")):
            return False
        if kind not in b"07\0":
            self.problems.append(TarProblem(data - BLOCK, "link" if kind in b"12" else "special_file", name))
            return False
        if (
            name.startswith(("/", "\\"))
            or ".." in name.replace("\\", "/").split("/")
            or "\0" in name
            or name[1:2] == ":"
        ):
            self.problems.append(TarProblem(data - BLOCK, "unsafe_name", name))
            return False
        return True

    def _text(self, offset: int, size: int) -> str:
        return os.pread(self.descriptor, min(size, _MAX_META), offset).decode("utf-8", "surrogateescape")

    def _skip_zeros(self, at: int) -> int:
        """Offset of the next block that is not zero, or the end of the file."""
        while at < self.length:
            window = os.pread(self.descriptor, _WINDOW, at)
            rest = window.lstrip(b"\0")
            if rest:
                return at + (len(window) - len(rest)) // BLOCK * BLOCK
            at += len(window)
        return self.length

    def _next_header(self, at: int) -> int:
        """Offset of the next header (its magic and checksum are right) or end marker, or the end of the file."""
        while at < self.length:
            window = os.pread(self.descriptor, _WINDOW, at)
            found = window.find(b"ustar")
            while found >= 0:
                start = found - 257
                if start >= 0 and start % BLOCK == 0 and _checksum_is_right(window[start : start + BLOCK]):
                    return at + start
                found = window.find(b"ustar", found + 1)
            at += len(window)
        return self.length


def names_before(descriptor: int, offset: int) -> Iterator[str]:
    """Possible names of the member whose data start at ``offset``: from its header, then from each long-name or pax
    record before it.

    Reading backwards is cheap, but data that look like a header can mislead it: the caller must recognise the name.
    """
    yield _parse_name(os.pread(descriptor, BLOCK, offset - BLOCK))
    for reach in (16 * BLOCK, 2 * _MAX_META):  # most records are short
        yield from _names_in(os.pread(descriptor, min(reach, offset - BLOCK), max(0, offset - BLOCK - reach)))


def _names_in(before: bytes) -> Iterator[str]:
    ends = {len(before)}  # a record belongs to the member if it ends at its header, or at the next of its records
    for at in range(len(before) - BLOCK, -1, -BLOCK):
        header = before[at : at + BLOCK]
        kind = header[156:157]
        if kind not in (b"L", b"K", b"x", b"g") or not _checksum_is_right(header):
            continue
        size, data = _parse_size(header), at + BLOCK
        if size is None or data + (size + BLOCK - 1) // BLOCK * BLOCK not in ends:
            continue
        ends.add(at)
        if kind == b"L":
            yield before[data : data + size].decode("utf-8", "surrogateescape").rstrip("\0")
        elif kind == b"x" and (path := _parse_pax(before[data : data + size]).get("path")):
            yield path


def _checksum_is_right(header: bytes) -> bool:
    if len(header) != BLOCK:
        return False
    stated = _octal(header[148:156])
    return stated is not None and stated == sum(header) - sum(header[148:156]) + 256


def _parse_size(header: bytes) -> int | None:
    field = header[124:136]
    if field[0] == 0x80:  # base 256, beyond 8 GiB
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip()
    try:
        value = int(digits, 8) if digits else 0
    except ValueError:
        return None
    return value if value >= 0 else None


def _parse_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _parse_pax(record: bytes) -> dict[str, str]:
    """``path`` and ``size`` of a pax record: lines of "LENGTH key=value\\n"."""
    found: dict[str, str] = {}
    at = 0
    while at < len(record):
        length, space, _ = record[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = record[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return found
