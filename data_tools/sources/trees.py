"""Files by name in a folder, in one or several zip archives, or in tars. Archives are not unpacked: their directories
are read once, then any member is read in place, by several processes at a time."""

from __future__ import annotations

import bz2
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from data_tools.format import tar_reader
from data_tools.format.tar_reader import BLOCK
from data_tools.io.errors import UserError
from data_tools.samples.reject import Reject
from data_tools.sources.base import Problem, Stored, hash_text

SIDE_LIMIT = 16 << 20
"""Largest caption or .json in an archive, which are read into memory."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1 | 0x40


class Tree(Protocol):
    """A set of files by relative name."""

    path: Path
    problems: list[Problem]
    names: list[str]
    """Sorted, without hidden files."""

    def fingerprint(self) -> str:
        """Changes whenever a file may have changed."""
        ...

    def picture(self, name: str) -> str | Stored:
        """The ``image`` of a `Row` for the image of this name."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a caption, .json or table. Raises Reject if it is damaged or larger than SIDE_LIMIT."""
        ...

    def local(self, name: str) -> tuple[Path, Any]:
        """(A local file with the content of ``name``, an object to keep while the file is used)."""
        ...


class FolderTree:
    """The files below a folder, without following links to folders."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self._sizes: dict[str, int] = {}
        for folder, folders, files in os.walk(path, followlinks=False):
            folders.sort()
            for name in files:
                full = os.path.join(folder, name)
                if wanted(name) and not name.startswith(".") and os.path.isfile(full):
                    self._sizes[os.path.relpath(full, path)] = os.stat(full).st_size
        self.names = sorted(self._sizes)

    def fingerprint(self) -> str:
        return hash_text(sorted(self._sizes.items()))

    def picture(self, name: str) -> str | Stored:
        return name

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def local(self, name: str) -> tuple[Path, Any]:
        return self.path / name, None


class _Archives:
    """The base of zips and tars: members by name, descriptors opened in each process on demand."""

    def __init__(self, paths: list[Path]) -> None:
        self.path, self.paths = paths[0].parent if len(paths) > 1 else paths[0], paths
        self.problems: list[Problem] = []
        self.names: list[str] = []
        self._descriptors: dict[int, int] = {}

    def _open(self, archive: int) -> int:
        descriptor = self._descriptors.get(archive)
        if descriptor is None:
            if len(self._descriptors) >= 200:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._descriptors[archive] = os.open(self.paths[archive], os.O_RDONLY)
        return descriptor

    def _set(self, members: list[tuple[str, int]]) -> list[int]:
        """Sets ``names`` from (name, archive) of all members and returns the order. If two archives have one name, all
        names are prefixed with their archive's."""
        if len({name for name, _ in members}) < len(members) and len(self.paths) > 1:
            members = [(f"{self.paths[archive].name}/{name}", archive) for name, archive in members]
        order = sorted(range(len(members)), key=lambda number: members[number][0])
        kept: list[int] = []
        for number in order:
            name, archive = members[number]
            if self.names and self.names[-1] == name:
                self.problems.append(Problem(name, "duplicate_key", f"{self.paths[archive].name}:{name}"))
                continue
            self.names.append(name)
            kept.append(number)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        return kept

    def picture(self, name: str) -> str | Stored:
        return Stored(name, lambda limit: self.member(name, limit, "file_too_large"))

    def read(self, name: str) -> bytes:
        return self.member(name, SIDE_LIMIT, "too_large")

    def member(self, name: str, limit: int, reason: str) -> bytes:
        """The bytes of a member. Raises Reject(reason) if there are more than ``limit``."""
        raise NotImplementedError

    def local(self, name: str) -> tuple[Path, Any]:
        from data_tools.sources.unpacked import Copy

        copy = Copy(name.rpartition("/")[2])
        try:
            copy.write(self.member(name, 1 << 32, "too_large"))
        except Reject as reject:
            raise UserError(f"{self.path}: {name}: {reject.reason}; unpack it and name the table") from None
        return copy.close(), copy


_MEMBER = np.dtype(
    [("archive", "<u4"), ("offset", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("method", "<u2"),
     ("flags", "<u2")]
)  # fmt: skip


class ZipTree(_Archives):
    """Members of zip archives, from their central directories."""

    def __init__(self, paths: list[Path], wanted: Callable[[str], bool], inner: str = "") -> None:
        super().__init__(paths)
        members: list[tuple[str, int]] = []
        places: list[tuple[int, ...]] = []
        for number, path in enumerate(paths):
            for info in _directory(path):
                name = _below(info.filename, inner)
                if name and not hidden(info.filename) and wanted(name):
                    members.append((name, number))
                    place = (max(0, info.header_offset), info.compress_size, info.file_size, info.CRC)
                    places.append((number, *place, info.compress_type, info.flag_bits))
        kept = self._set(members)
        self._places = np.array(places, _MEMBER)[kept] if places else np.zeros(0, _MEMBER)

    def fingerprint(self) -> str:
        names = xxhash.xxh3_128_hexdigest("\n".join(self.names).encode("utf-8", "surrogateescape"))
        return hash_text(names, xxhash.xxh3_128_hexdigest(self._places.tobytes()))

    def member(self, name: str, limit: int, reason: str) -> bytes:
        place = self._places[self._numbers[name]]
        size, packed, offset = int(place["size"]), int(place["packed"]), int(place["offset"])
        if int(place["flags"]) & _ENCRYPTED:
            raise Reject("encrypted", name)
        if size > limit or packed > 2 * limit + 1024:
            raise Reject(reason, name)
        descriptor = self._open(int(place["archive"]))
        header = os.pread(descriptor, _LOCAL_HEADER.size, offset)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise Reject("zip_damaged", name)
        *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        raw = os.pread(descriptor, packed, offset + _LOCAL_HEADER.size + name_size + extra_size)
        data = _expand(raw, int(place["method"]), size, name)
        if len(raw) < packed or len(data) < size or zlib.crc32(data) != int(place["crc"]):
            raise Reject("zip_damaged", name)
        return data


def _directory(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, OSError) as error:
        raise UserError(
            f"{path}: not readable as a zip ({error}); fetch it again, or unpack what can be unpacked"
        ) from None


def _expand(raw: bytes, method: int, size: int, name: str) -> bytes:
    """The member decompressed, at most one byte more than ``size``."""
    stream: Any
    if method == zipfile.ZIP_STORED:
        data = raw
    elif method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        try:
            if method == zipfile.ZIP_DEFLATED:
                stream = zlib.decompressobj(-15)
            else:
                stream = bz2.BZ2Decompressor() if method == zipfile.ZIP_BZIP2 else _lzma(raw)
                raw = raw if method == zipfile.ZIP_BZIP2 else raw[4 + int.from_bytes(raw[2:4], "little") :]
            data = stream.decompress(raw, size + 1)
        except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError, struct.error):
            raise Reject("zip_damaged", name) from None
    else:
        raise Reject("zip_method", name)
    if len(data) > size:
        raise Reject("zip_bomb", name)
    return data


def _lzma(raw: bytes) -> lzma.LZMADecompressor:
    """The decoder described by a member's first bytes, with a dictionary of at most 64 MiB."""
    properties, dictionary = raw[4], int.from_bytes(raw[5:9], "little")
    rest, lc = divmod(properties, 9)
    pb, lp = divmod(rest, 5)
    settings = {
        "id": lzma.FILTER_LZMA1,
        "dict_size": max(4096, min(dictionary, 64 << 20)),
        "lc": lc,
        "lp": lp,
        "pb": pb,
    }
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[settings])


class TarTree(_Archives):
    """Members of tars, from one walk over their headers."""

    def __init__(self, paths: list[Path], wanted: Callable[[str], bool], inner: str = "", kept: Any = None) -> None:
        super().__init__(paths)
        self._kept = kept  # temporary files among the paths
        members: list[tuple[str, int]] = []
        places: list[tuple[int, int]] = []
        for number, path in enumerate(paths):
            problems: list[tar_reader.TarProblem] = []
            for member in tar_reader.walk(path, problems):
                name = _below(member.name.removeprefix("./"), inner)
                if name and not hidden(name) and wanted(name):
                    members.append((name, number))
                    places.append((member.offset, member.size))
            self.problems += [Problem(one.name, one.reason, f"{path.name}@{one.offset}") for one in problems]
        kept = self._set(members)
        archives = [members[number][1] for number in kept]
        self._places = [(archive, *places[number]) for archive, number in zip(archives, kept, strict=True)]

    def fingerprint(self) -> str:
        return hash_text(self.names, self._places)

    def member(self, name: str, limit: int, reason: str) -> bytes:
        archive, offset, size = self._places[self._numbers[name]]
        if size > limit:
            raise Reject(reason, name)
        assert offset >= BLOCK
        return os.pread(self._open(archive), size, offset)


def _below(name: str, inner: str) -> str:
    """The name relative to the folder ``inner`` of the archive; empty if it is not inside."""
    return name[len(inner) :] if name.startswith(inner) else ""


def hidden(name: str) -> bool:
    """Whether a file is a hidden or system file: .DS_Store, ._1.jpg, __MACOSX/."""
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith(".")
