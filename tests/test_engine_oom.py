"""Running out of memory is recognised in all the words that CUDA and its libraries have for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from trainer.core.types import PeerLost, UserError, is_out_of_memory
from trainer.engine.oom import OutOfMemory
from trainer.losses.topology import Naming

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO "
    "for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 2 'out of memory'"
)
WORDS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cudaErrorMemoryAllocation: cudaHostAlloc failed"),
    dist.DistBackendError(NCCL),
]
OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("out of memory"),
    PeerLost("rank 0 failed: OutOfMemoryError: CUDA out of memory"),
    UserError("rank 1 ran out of memory in the loss"),
    None,
]


@pytest.mark.parametrize("error", WORDS, ids=str)
def test_it_is_recognised_in_its_other_words(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_and_those_of_other_ranks_are_not_it(error: Exception | None) -> None:
    assert not is_out_of_memory(error)


def test_memory_of_ones_own_in_a_transfer_does_not_blame_the_peer() -> None:
    with pytest.raises(RuntimeError) as raised, Naming("rank 0 lost its peer"):
        raise dist.DistBackendError(NCCL)
    assert not isinstance(raised.value, PeerLost)
    with pytest.raises(PeerLost, match="rank 0 lost its peer: Connection closed"), Naming("rank 0 lost its peer"):
        raise RuntimeError("Connection closed by peer")


def test_after_nccl_itself_ran_out_of_memory_the_step_is_not_repeated() -> None:
    """Its communicator is lost, wherever the call was made."""
    trouble = OutOfMemory()
    message = r"ran out of memory in the loss, during communication.*'out of memory'"
    with pytest.raises(UserError, match=message), trouble.during("in the loss"):
        raise dist.DistBackendError(NCCL)
    with trouble.during("in the first pass"):
        raise RuntimeError("CUDA error: out of memory")
    assert trouble.here
