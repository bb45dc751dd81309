"""Temporary copies of files that cannot be read from any byte offset: compressed files, and tables in UTF-16 or other
encodings.

Measured: gunzip and writing run at 180 MB per processor second, the strict check of JPEGs at 70, so unpacking once is
affordable, while decompressing the stream again for every shard is not. The copy is in TMPDIR and is removed with the
process.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_tools.io.errors import UserError

_PIECE = 4 << 20
_RESERVE = 1 << 30
"""Bytes to keep free on the disk of the copies: a small file may unpack to any size."""
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}
SUFFIXES = {"gz": "", "zst": "", "bz2": "", "xz": "", "tgz": "tar", "tzst": "tar", "tbz2": "tar"}
"""Suffix of a compressed file -> the suffix of the file inside, if it implies one."""


class Copy:
    """A temporary file in its own folder, which is removed with this object."""

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ringlip-")
        self.path = Path(self._folder.name, name)
        self.file: IO[bytes] = open(self.path, "wb", buffering=0)  # noqa: SIM115
        self._source = name

    def write(self, piece: bytes) -> None:
        """Appends. Raises UserError before the disk is full."""
        if shutil.disk_usage(self.path.parent).free < _RESERVE + len(piece):
            raise UserError(
                f"{self._source}: unpacked it does not fit in {self.path.parent} (1 GiB is kept free there); set "
                "TMPDIR "
                f"to a folder with more room"
            )
        self.file.write(piece)

    def close(self) -> Path:
        """Closes the file and returns its path."""
        self.file.close()
        return self.path


def stem_of(path: Path) -> str:
    """The name without its compression suffix: pairs.csv.gz -> pairs.csv, pets.tgz -> pets.tar."""
    inner = SUFFIXES.get(path.suffix.lower().lstrip("."))
    return path.name if inner is None else f"{path.stem}.{inner}".rstrip(".")


def compression(path: Path) -> str | None:
    """The compression of a file, from its first bytes."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)


def unpack(path: Path) -> Copy | None:
    """A decompressed copy of a file; None if it is not compressed. Raises UserError."""
    kind = compression(path)
    if kind is None:
        return None
    if kind == "xz":  # an xz file may demand gigabytes of memory
        raise UserError(f"{path}: compressed with xz; unpack it first: xz -dk {path}")
    copy = Copy(stem_of(path))
    print(f"{path}: unpacking to {copy.path.parent}, as its samples are read in any order", file=sys.stderr, flush=True)
    with _explained(path):
        for piece in _pieces(path, kind):
            copy.write(piece)
    copy.close()
    return copy


def _pieces(path: Path, kind: str) -> Iterator[bytes]:
    stream: Any
    if kind == "zstd":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    else:
        stream = gzip.GzipFile(path) if kind == "gzip" else bz2.BZ2File(path)
    with stream:
        while piece := stream.read(_PIECE):
            yield piece


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile and Arrow's are OSErrors
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be unpacked ({said}); fetch it again, or set TMPDIR") from error


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("ringlip-mark", _mark)


def transcode(path: Path, encoding: str) -> Copy:
    """A UTF-8 copy of a text file. What cannot be decoded becomes an invalid byte, so that its row is rejected by
    name."""
    copy = Copy(path.name)
    decoder = codecs.getincrementaldecoder(encoding)("ringlip-mark")
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            copy.write(decoder.decode(piece).encode("utf-8", "surrogateescape"))
    copy.write(decoder.decode(b"", final=True).encode("utf-8", "surrogateescape"))
    copy.close()
    return copy
