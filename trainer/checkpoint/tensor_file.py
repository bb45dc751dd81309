"""safetensors files, written as a stream (header first, then one tensor after another, hashed on the way) and read by
name. No pickle.

The safetensors library writes from a dict of all tensors; a second copy of an optimizer state would not fit in memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

# https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """One tensor of a file to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


SYNC_BYTES = 256 << 20


class DigestFile:
    """A new file that computes its size and xxh3-128 digest while written; ``close`` syncs it.

    It is also synced on the way, because other ranks wait for ``close`` and must not wait for the whole file to reach
    the disk.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._digest = xxhash.xxh3_128()
        self.size = 0
        self._unsynced = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:  # an unbuffered write may be partial
            written = self._file.write(view)
            self._digest.update(view[:written])
            self.size += written
            self._unsynced += written
            if self._unsynced >= SYNC_BYTES:
                os.fdatasync(self._file.fileno())
                self._unsynced = 0
            view = view[written:]

    def close(self) -> dict[str, Any]:
        """Closes the file; returns its entry for the manifest."""
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.size, "xxh3_128": self._digest.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


class TensorWriter:
    """Writes ``entries`` into ``file``, in order."""

    def __init__(self, file: DigestFile, entries: list[Entry]) -> None:
        self._file = file
        self._left = entries[::-1]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": DTYPES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [offset, offset + entry.size],
            }
            offset += entry.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, which must match the next entry."""
        entry = self._left.pop()
        assert (name, tensor.dtype, tuple(tensor.shape)) == entry, (
            f"{name} {tensor.dtype} {tuple(tensor.shape)} where {entry} was announced"
        )
        if tensor.numel():
            self._file.write(tensor_bytes(tensor))

    def finish(self) -> None:
        assert not self._left, f"{self._left[-1]} was announced and did not come"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, row-major; without a copy if it is on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class TensorReader:
    """A memory-mapped safetensors file; loads one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self.names: list[str] = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self.names}

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


def digest_of(path: Path) -> str:
    """The file's xxh3-128, hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(16 << 20):
            digest.update(chunk)
    return digest.hexdigest()
