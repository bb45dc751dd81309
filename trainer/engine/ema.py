"""The running average of the weights (``OptimSettings.ema``): how it moves, and how it stands in for the weights for a
while.

    average_weights(ds_engine, 0.999)                   # after each step
    with averaged(ds_engine): ...  # forward computes with the average; afterwards with the weights, bit for bit

It lies among the optimizer's moments, cut up as they are (trainer/engine/fragments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from trainer.core.distributed import device, world_size
from trainer.core.partitioned import Dense, PartitionedOptimizer
from trainer.engine.fragments import BUCKET_BYTES, Fragment, buckets, fragments, write_model_copy
from trainer.engine.state_names import AVERAGE, WEIGHT


@torch.no_grad()
def average_weights(engine: Any, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weight, on what this rank holds; the first call, after the first update, takes
    the weights as they are. ``decay`` 0 drops the average. No communication.
    """
    for fragment in fragments(engine):
        # A parameter that has had no gradient yet has no state, and must not get one: the optimizer makes its moments
        # where there is none.
        state = fragment.state
        if not state:
            continue
        if not decay:
            state.pop(AVERAGE, None)
        elif AVERAGE in state:
            fragment.read(AVERAGE).lerp_(fragment.read(WEIGHT), 1 - decay)
        elif isinstance(fragment.optimizer, PartitionedOptimizer):
            state[AVERAGE] = Dense(fragment.read(WEIGHT).clone())
        else:  # at ZeRO 1 to 3 many parameters share a flat partition: the average of all of it
            state[AVERAGE] = fragment.master.detach().clone()


@contextmanager
def averaged(engine: Any) -> Iterator[bool]:
    """Within, forward computes with the average wherever there is one; gives whether there is any. All ranks together,
    between steps.

    No second copy of the model: the weights stay where the optimizer keeps them, and take back their place from there.
    """
    pieces = [piece for piece in fragments(engine) if AVERAGE in piece.kinds()]
    _show(engine, pieces, AVERAGE)
    yield bool(pieces)
    # Not after an error: the other ranks may be elsewhere and would never meet this one here; the run ends, and says
    # why.
    _show(engine, pieces, WEIGHT)


@torch.no_grad()
def _show(engine: Any, pieces: list[Fragment], kind: str) -> None:
    """Puts the average, or the weights again, where forward reads. Takes one bucket of memory, at ZeRO 0 that of one
    parameter."""
    for piece in pieces:
        if (
            piece.master is piece.parameter
        ):  # ZeRO 0 keeps the weights nowhere else: the two change places, both ways alike
            weight, average = piece.read(WEIGHT), piece.read(AVERAGE)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
    apart = [piece for piece in pieces if piece.master is not piece.parameter]
    for bucket in buckets(apart, {piece.name: {kind: piece.shape} for piece in apart}, BUCKET_BYTES):
        buffer = torch.zeros(sum(span.numel for span in bucket), dtype=torch.float32, device=device())
        parts = buffer.split([span.numel for span in bucket])
        for span, part in zip(bucket, parts, strict=True):
            span.gather(part)
        if world_size() > 1:  # as integers: all but one addend are 0, so the bits arrive as they are
            dist.all_reduce(buffer.view(torch.int32))
        for span, part in zip(bucket, parts, strict=True):
            write_model_copy(span, part)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.invalidate_secondary_tensor()  # ZeRO++ keeps a second copy of the weights within a node
