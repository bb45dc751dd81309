"""Host memory for batches: a fixed ring of buffers, each as large as one batch.

    buffers = BatchBuffers(shapes, number=4, device=0)
    batch, rows = buffers.take()            # Batch, and its tensors as numpy arrays to fill

With a GPU the memory is page-locked, so that copies to the GPU are asynchronous. torch rounds page-locked memory up to
powers of two: a batch of 616 MB would take 1 GiB.
"""

from __future__ import annotations

import mmap
import weakref
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.core.types import Batch, RunFailed
from trainer.data.reader import Rows

BATCH_TYPES = {
    np.uint8: torch.uint8,
    np.float16: torch.float16,
    np.float32: torch.float32,
    np.int32: torch.int64,
    np.bool_: torch.bool,
    np.int64: torch.int64,
}
"""dtype of a reader's rows -> dtype in the batch."""
PATIENCE = 0.05
"""Seconds to wait for a buffer that the consumer is about to release."""
ALIGNMENT = 64
"""In bytes, of every tensor of a batch."""


class BatchBuffers:
    """``shapes`` of a batch's tensors, with the dtypes of a reader's rows, decide the size; ``device`` is the GPU to
    copy to, or None."""

    def __init__(self, shapes: list[tuple[tuple[int, ...], type[Any]]], number: int, device: int | None) -> None:
        self._device = device
        self._layout: list[tuple[tuple[int, ...], np.dtype[Any], int, int]] = []
        self.nbytes = 0
        """Size of one buffer."""
        for shape, kind in shapes:
            dtype = torch.empty(0, dtype=BATCH_TYPES[kind]).numpy().dtype
            size = int(np.prod(shape)) * dtype.itemsize
            self._layout.append((shape, dtype, self.nbytes, size))
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._free: SimpleQueue[tuple[mmap.mmap, torch.cuda.Event | None]] = SimpleQueue()
        for _ in range(number):
            memory = mmap.mmap(-1, self.nbytes)
            if device is not None:
                _lock_pages(self, memory)
            self._free.put((memory, None))

    def take(self) -> tuple[Batch, Rows]:
        """A batch in a free buffer. A buffer is free when all tensors in it, and views of them, are gone; a consumer
        that keeps more batches than there are buffers gets ordinary memory."""
        try:
            memory, copied = self._free.get(timeout=PATIENCE)
        except Empty:
            return self._batch(np.empty(self.nbytes, np.uint8))
        if copied is not None:
            copied.synchronize()
        view = np.frombuffer(memory, np.uint8)  # referenced by the tensors of this batch only
        weakref.finalize(view, self._give_back, memory).atexit = False
        return self._batch(view)

    def _batch(self, memory: NDArray[np.uint8]) -> tuple[Batch, Rows]:
        arrays = [memory[start : start + size].view(dtype).reshape(shape) for shape, dtype, start, size in self._layout]
        return Batch(*(torch.from_numpy(array) for array in arrays)), Rows(*arrays)

    def _give_back(self, memory: mmap.mmap) -> None:
        copied = None
        if self._device is not None:  # copies from it may still be running
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._free.put((memory, copied))


def _lock_pages(owner: BatchBuffers, memory: mmap.mmap) -> None:
    """Registers the memory with CUDA for the lifetime of ``owner``, which its batches keep alive."""
    address, cuda = np.frombuffer(memory, np.uint8).ctypes.data, torch.cuda.cudart()
    code = int(cuda.cudaHostRegister(address, len(memory), 0))
    if code != 0:
        raise RunFailed(
            f"data: {len(memory) / 1e9:.2f} GB of host memory for a batch cannot be page-locked (CUDA error {code}): "
            "lower "
            f"data.prefetch or batch.size, or raise `ulimit -l` and the container's memory limit"
        )
    weakref.finalize(owner, cuda.cudaHostUnregister, address).atexit = False
