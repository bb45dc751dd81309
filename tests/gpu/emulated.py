"""Several ranks on one device: what this process would send to a neighbour it receives itself.

``nccl`` makes it send to itself over NCCL, whose kernels are then real and run beside the products.

Exact where all ranks bring the same rows: then what arrives from a neighbour is what this rank would have sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.profiler import record_function

from trainer.losses.topology import Ring

TRANSFER = "nccl: emulated transfer"
REAL_OPERATION, REAL_EXCHANGE = dist.P2POp, dist.batch_isend_irecv


class _Operation:
    def __init__(self, operation: Callable[..., Any], tensor: Any, group: Any = None, group_peer: Any = None) -> None:
        self.operation, self.sends, self.tensor = operation, operation is dist.isend, tensor


class _Done:
    def wait(self) -> None: ...


def _exchange(operations: list[_Operation]) -> list[_Done]:
    sent = [operation.tensor for operation in operations if operation.sends]
    received = [operation.tensor for operation in operations if not operation.sends]
    assert len(sent) == len(received)
    with record_function(TRANSFER):
        for source, target in zip(sent, received, strict=True):
            target.copy_(source)
    return [_Done()]


def _exchange_over_nccl(operations: list[_Operation]) -> list[dist.Work]:
    return REAL_EXCHANGE([REAL_OPERATION(operation.operation, operation.tensor, 0) for operation in operations])


@contextmanager
def ranks(world: int, nccl: bool = False) -> Iterator[None]:
    """Within, the losses see ``world`` ranks, of which this process is rank 0."""
    assert dist.is_initialized(), "without a process group a loss asks nobody how many ranks there are"
    with ExitStack() as stack:
        for target, name, value in (
            (dist, "get_world_size", lambda group=None: world),
            (dist, "get_backend", lambda group=None: "nccl"),
            (dist, "P2POp", _Operation),
            (dist, "batch_isend_irecv", _exchange_over_nccl if nccl else _exchange),
            (Ring, "_agree", lambda ring, rows, lanes, signature: ([rows] * world, [lanes] * world)),
            (Ring, "check_memory", lambda ring, error: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield
