"""A few float32 numbers for every training sample, divided over the host memory of all ranks.

    table = SampleTable(width=2, group=None)
    before = table.read(all_ids)             # [B, 2] on every rank; 0 for a sample that was never written
    table.write(all_ids, after)

Samples are named by their number (``Batch.ids``). A chunk of CHUNK consecutive numbers belongs to rank
``chunk % world``, which allocates it when the first of them is seen: a billion samples of two numbers take 8 GB over
all ranks, and opening the table takes nothing. Checkpoints store whole chunks, so any number of ranks can resume.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 16
PREFIX = "samples."
"""Chunks are the tensors ``samples.CHUNK_NUMBER`` of a checkpoint's loss.safetensors, [CHUNK, width] float32."""


class SampleTable:
    """[samples, ``width``] float32, zero until written."""

    def __init__(self, width: int, group: dist.ProcessGroup | None = None) -> None:
        self.width, self.group = width, group
        self.numbers: set[int] = set()
        """Chunks that any rank has written to; the same on all ranks."""
        self._chunks: dict[int, NDArray[np.float32]] = {}
        self._replaced: list[tuple[int, NDArray[np.int64], NDArray[np.float32]]] | None = None

    @property
    def _rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def _world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def read(self, ids: Tensor) -> Tensor:
        """``ids`` [B] int64, the same on all ranks -> [B, width] float32 on their device. A collective call: each rank
        contributes the samples that it keeps."""
        found = np.zeros((ids.numel(), self.width), np.float32)
        for chunk, places, rows in self._mine(ids):
            if chunk in self._chunks:
                found[places] = self._chunks[chunk][rows]
        result = torch.from_numpy(found).to(ids.device)
        if self._world > 1:
            dist.all_reduce(result, group=self.group)  # all but one rank add zeros
        return result

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Stores ``values`` [B, width], the same on all ranks; of a repeated id the last counts."""
        self.numbers.update(np.unique(ids.cpu().numpy() // CHUNK).tolist())
        new = values.float().cpu().numpy()
        for chunk, places, rows in self._mine(ids):
            kept = self._chunk(chunk)
            if self._replaced is not None:
                self._replaced.append((chunk, rows, kept[rows]))
            kept[rows] = new[places]

    def snapshot(self) -> Callable[[], None]:
        """A function that takes back all writes since this call; only what they replace is copied."""
        numbers = set(self.numbers)
        replaced: list[tuple[int, NDArray[np.int64], NDArray[np.float32]]] = []
        self._replaced = replaced

        def restore() -> None:
            for chunk, rows, before in reversed(replaced):
                self._chunks[chunk][rows] = before
            replaced.clear()
            self.numbers = set(numbers)

        return restore

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, chunk) on rank 0, in the order of ``names``; every rank must exhaust it."""
        for chunk in sorted(self.numbers):
            owner = chunk % self._world
            mine = torch.from_numpy(self._chunk(chunk)) if owner == self._rank else torch.empty(CHUNK, self.width)
            mine = self._move(mine, owner, 0)
            if self._rank == 0:
                yield f"{PREFIX}{chunk}", mine

    @property
    def names(self) -> list[str]:
        """Names of the tensors of a checkpoint, each [CHUNK, width] float32."""
        return [f"{PREFIX}{chunk}" for chunk in sorted(self.numbers)]

    def load(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """Replaces everything by the tensors of a checkpoint; ``read`` is called on rank 0 only. A collective call."""
        self._chunks.clear()
        self.numbers = {int(name.removeprefix(PREFIX)) for name in names}
        for chunk in sorted(self.numbers):
            owner = chunk % self._world
            values = read(f"{PREFIX}{chunk}") if self._rank == 0 else torch.empty(CHUNK, self.width)
            values = self._move(values, 0, owner)
            if owner == self._rank:
                self._chunk(chunk)[:] = values.numpy()

    def _move(self, values: Tensor, source: int, target: int) -> Tensor:
        """``values`` of rank ``source`` on rank ``target``, in host memory."""
        if source == target or self._rank not in (source, target):
            return values
        device = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        travelling = values.to(device)
        if self._rank == source:
            dist.send(travelling, group=self.group, group_dst=target)
        else:
            dist.recv(travelling, group=self.group, group_src=source)
        return travelling.cpu()

    def _chunk(self, chunk: int) -> NDArray[np.float32]:
        """Mapped at first use: the system gives pages of zeros only as they are touched, and small ones if asked to."""
        if chunk not in self._chunks:
            memory = mmap.mmap(-1, CHUNK * self.width * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            self._chunks[chunk] = np.frombuffer(memory, np.float32).reshape(CHUNK, self.width)
        return self._chunks[chunk]

    def _mine(self, ids: Tensor) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """(chunk, places in ``ids``, rows in the chunk) for each chunk that this rank keeps."""
        numbers = ids.cpu().numpy()
        chunks = numbers // CHUNK
        mine = np.flatnonzero(chunks % self._world == self._rank)
        mine = mine[np.argsort(chunks[mine], kind="stable")]  # stable: of a repeated id the last stays last
        for places in np.split(mine, np.flatnonzero(np.diff(chunks[mine])) + 1):
            if places.size:
                yield int(chunks[places[0]]), places, numbers[places] % CHUNK
