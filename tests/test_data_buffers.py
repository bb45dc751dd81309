"""Batches are made in a fixed number of buffers of the right size, and never in one that somebody still reads."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.core.types import RunFailed
from trainer.data import buffers as module
from trainer.data.buffers import ALIGNMENT, BatchBuffers

SHAPES: list[tuple[tuple[int, ...], type[Any]]] = [
    ((3, 3, 5, 7), np.uint8),
    ((3, 9), np.int32),
    ((3, 9), np.bool_),
    ((3,), np.int64),
    ((3,), np.int64),
    ((3, 8), np.float16),
]


def address(batch: Any) -> int:
    return batch.pixels.data_ptr()


def test_a_batch_has_the_types_of_a_batch_and_shares_its_memory_with_the_rows() -> None:
    batch, rows = BatchBuffers(SHAPES, 1, None).take()
    assert [t.dtype for t in batch[:5]] == [torch.uint8, torch.int64, torch.bool, torch.int64, torch.int64]
    assert batch.taught.dtype == torch.float16
    assert [tuple(t.shape) for t in batch] == [shape for shape, _ in SHAPES]
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in batch)
    for number, (tensor, row) in enumerate(zip(batch, rows, strict=True)):
        row[...] = number % 2 if tensor.dtype == torch.bool else number
    for number, tensor in enumerate(batch):
        assert (tensor == (number % 2 if tensor.dtype == torch.bool else number)).all()


def test_a_buffer_is_used_again_when_its_batch_is_gone_and_not_before() -> None:
    pool = BatchBuffers(SHAPES, 2, None)
    addresses = set()
    for _ in range(6):
        batch, rows = pool.take()
        addresses.add(address(batch))
        part = batch.split(2)[0].pixels[:, 1]
        del batch, rows
        batch, rows = pool.take()
        assert not part.data_ptr() <= address(batch) < part.data_ptr() + 7  # a view still reads the first one
        addresses.add(address(batch))
        del batch, rows, part
        gc.collect()
    assert len(addresses) == 2


def test_who_keeps_more_batches_than_there_are_buffers_gets_others() -> None:
    pool = BatchBuffers(SHAPES, 2, None)
    kept = [pool.take()[0] for _ in range(5)]
    for number, batch in enumerate(kept):
        batch.ids.fill_(number)
    assert [int(batch.ids[0]) for batch in kept] == list(range(5))


class Cuda:
    """What a GPU would be asked for."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.registered, self.sizes, self.events = code, set[int](), list[int](), list[str]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered.add(address)
        self.sizes.append(size)
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0

    def Event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self.events.append("record"), synchronize=lambda: self.events.append("wait")
        )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "Event", fake.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    return fake


def test_pages_are_locked_once_in_the_size_of_a_batch_and_let_go_with_the_last_one(cuda: Cuda) -> None:
    """torch's own allocator would round 40 MiB and a little up to 64."""
    pool = BatchBuffers([((41 << 20,), np.uint8), *SHAPES[1:]], 3, 0)
    for _ in range(5):
        batch, _ = pool.take()
    assert len(cuda.sizes) == 3 and {size - (41 << 20) < 4096 for size in cuda.sizes} == {True}
    del pool
    gc.collect()
    assert len(cuda.registered) == 3  # a batch still lies there
    del batch, _
    gc.collect()
    assert not cuda.registered


def test_a_buffer_is_filled_again_after_the_copies_out_of_it(cuda: Cuda) -> None:
    pool = BatchBuffers(SHAPES, 1, 0)
    batch, rows = pool.take()
    assert cuda.events == []
    del batch, rows
    pool.take()
    assert cuda.events[:2] == ["record", "wait"]


def test_memory_that_cannot_be_locked_is_told_with_what_would_help(cuda: Cuda) -> None:
    cuda.code = 2
    with pytest.raises(RunFailed, match=r"cannot be page-locked \(CUDA error 2\): lower data.prefetch"):
        module.BatchBuffers(SHAPES, 1, 0)
