"""Writes ustar archives fast: minimal headers, data gathered into large ``writev`` calls and hashed on the way.

Python's ``tarfile`` spends most of its time building headers. Here names are short, sizes are known and nothing else
varies (no time, owner or mode), so the same samples give the same bytes on every machine.
"""

from __future__ import annotations

import os

import xxhash

from data_tools.format.tar_reader import BLOCK

MAX_NAME = 100
MAX_SIZE = 8**11 - 1
_FLUSH = 8 << 20
_MAX_VECTORS = 1000  # IOV_MAX is 1024 on Linux

# name[100] | mode[8] uid[8] gid[8] | size[12] | mtime[12] | chksum[8] |
# type[1] link[100] magic[6] version[2] uname[32] gname[32] dev[16] prefix[155] pad[12]
_MODE = b"0000444\0" + b"0000000\0" * 2
_AFTER_SIZE = b"%011o\0" % 0
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + bytes(16) + bytes(167)
_FIXED_SUM = sum(_MODE) + sum(_AFTER_SIZE) + 8 * 32 + sum(_TAIL)
_PADDING = [bytes(-size % BLOCK) for size in range(BLOCK)]


def header(name: bytes, size: int) -> bytes:
    """The 512-byte ustar header of a regular file. ``name`` has at most 100 bytes."""
    assert 0 < len(name) <= MAX_NAME and 0 <= size <= MAX_SIZE, (name, size)
    octal = b"%011o\0" % size
    checksum = _FIXED_SUM + sum(name) + sum(octal)
    return b"%s%s%s%s%06o\0 %s" % (name.ljust(100, b"\0"), _MODE, octal, _AFTER_SIZE, checksum, _TAIL)


class TarWriter:
    """Appends members to a new file; ``close`` ends the archive, syncs it to disk and leaves ``bytes`` and ``digest``
    (xxh3_64, hex)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._hash = xxhash.xxh3_64()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self.bytes = 0
        self.digest = ""

    def add(self, name: str, data: bytes) -> int:
        """Appends one regular file and returns the offset of its data."""
        size = len(data)
        offset = self.bytes + BLOCK
        padding = _PADDING[size % BLOCK]
        self._pending += (
            (header(name.encode(), size), data, padding) if padding else (header(name.encode(), size), data)
        )
        added = BLOCK + size + len(padding)
        self.bytes += added
        self._pending_bytes += added
        if self._pending_bytes >= _FLUSH or len(self._pending) >= _MAX_VECTORS - 3:
            self._flush()
        return offset

    def _flush(self) -> None:
        # Joining small members first costs one copy, less than hashing and writing them one by one.
        buffers = [b"".join(self._pending)] if self._pending_bytes < len(self._pending) * 65536 else self._pending
        for buffer in buffers:
            self._hash.update(buffer)
        written = os.writev(self._descriptor, buffers)
        if written < self._pending_bytes:
            rest = memoryview(b"".join(buffers))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Ends the archive with two zero blocks and syncs it."""
        self._pending.append(bytes(2 * BLOCK))
        self._pending_bytes += 2 * BLOCK
        self.bytes += 2 * BLOCK
        self._flush()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self.digest = self._hash.hexdigest()

    def abandon(self) -> None:
        """Closes the file without completing the archive."""
        os.close(self._descriptor)
