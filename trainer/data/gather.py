"""What ranks know apart, put together: samples that were replaced, and the samples of a global batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer.core import collectives, distributed
from trainer.data.reader import SkippedSamples


def gather_skipped(skipped: SkippedSamples) -> dict[str, Any]:
    """The samples that all ranks replaced so far, as one record for the checkpoint."""
    ranks: list[Any] = [skipped]
    if distributed.world_size() > 1:
        ranks = [None] * distributed.world_size()
        dist.all_gather_object(ranks, skipped)
    reasons: Counter[str] = Counter()
    for one in ranks:
        reasons.update(one.reasons)
    return {
        "count": sum(one.count for one in ranks),
        "keys": sorted({key for one in ranks for key in one.keys}),
        "reasons": dict(reasons),
    }


def gather_sample_ids(ids: Tensor) -> list[int]:
    """Sample numbers of the global batch, in rank order."""
    return collectives.stack_over_ranks(ids.to(distributed.device())).flatten().tolist()
