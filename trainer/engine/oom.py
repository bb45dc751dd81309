"""Consensus over ranks about running out of memory: a step is repeated by all ranks or by none."""

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
    """Remembers that this rank ran out of memory, until all ranks have come to the same point and can agree on it.

        trouble = OutOfMemory()
        with trouble:                    # swallows running out of memory alone
            ...                          # no communication in here
        if trouble.anywhere(): ...       # the same answer on all ranks

    Between collectives that is all it takes. A rank that fails in the midst of one leaves its peers waiting inside the
    call, where no message reaches them: with ``communicates`` the rank therefore ends the run at once, in one line that
    says what would help; its peers lose the connection and end too, within seconds instead of at the timeout. An
    exchange that was brought to its end first (SharedOutOfMemory) is as good as none.
    """

    def __init__(self) -> None:
        self.here = False
        self._communicates = False
        self._where = ""

    def during(self, where: str, communicates: bool = False) -> OutOfMemory:
        """Names what is being done, for the message, and says whether ranks wait for each other in it."""
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
                f"rank {distributed.rank()} ran out of memory {self._where}, in the midst of an exchange with the "
                f"other ranks, which only leaves the last checkpoint: {REMEDY}{says}"
            ) from error
        self.here = True
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        return True

    def anywhere(self) -> bool:
        """Whether any rank ran out of memory since this object was made; ranks wait for each other."""
        return collectives.any_rank(self.here)


def free() -> None:
    """Gives back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
