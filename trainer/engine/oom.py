"""Agreement among ranks on out-of-memory errors: all ranks repeat a step, or none does."""

from __future__ import annotations

import gc
from types import TracebackType

import torch
import torch.distributed as dist

from trainer.core import collectives, distributed
from trainer.core.types import SharedOutOfMemory, UserError, is_out_of_memory

REMEDY = (
    "choose a smaller batch.micro_batch, a ds_config with a higher ZeRO stage or offload (ds_configs/README.md), "
    "model.recompute, or fewer loss.tile_rows; `python -m trainer.plan RECIPE` says what fits"
)
LOSS_REMEDY = (
    "lower loss.tile_rows or loss.size where there is one, take loss.exchange=ring, or spread batch.size over more "
    "ranks; "
    "`python -m trainer.plan RECIPE` says what fits"
)


class OutOfMemory:
    """Records that this rank ran out of memory, until all ranks reach the same point and can agree on it.

        trouble = OutOfMemory()
        with trouble:                    # suppresses out-of-memory errors only
            ...                          # no communication in here
        if trouble.anywhere(): ...       # the same answer on all ranks

    Between collectives this is enough. A rank that fails inside a collective leaves its peers waiting in the call,
    where no message reaches them: with ``communicates`` the rank therefore ends the run at once, with one line that
    says what would help. Its peers lose the connection and end within seconds instead of at the timeout. An error after
    a completed exchange (SharedOutOfMemory) is handled like one between collectives.
    """

    def __init__(self) -> None:
        self.here = False
        self._communicates = False
        self._where = ""

    def during(self, where: str, communicates: bool = False) -> OutOfMemory:
        """Sets the activity for the message, and whether it contains collectives."""
        self._where, self._communicates = where, communicates
        return self

    def __enter__(self) -> OutOfMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        in_transfer = isinstance(error, dist.DistBackendError)  # NCCL's own memory: its communicator is lost
        if in_transfer or (self._communicates and not isinstance(error, SharedOutOfMemory)):
            says = f" ({' '.join(str(error).split())[-200:]})" if in_transfer else ""
            raise UserError(
                f"rank {distributed.rank()} ran out of memory {self._where}, during communication with other ranks, so "
                f"the step cannot be repeated; resume from the last checkpoint after a change: {REMEDY}{says}"
            ) from error
        self.here = True
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        return True

    def anywhere(self) -> bool:
        """Whether any rank ran out of memory since this object was created. A collective."""
        return collectives.any_rank(self.here)


def free() -> None:
    """Releases the memory of a failed attempt."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
