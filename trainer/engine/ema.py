"""The running average of the weights (``OptimSettings.ema``): updating it, and computing with it instead of the
weights.

    average_weights(ds_engine, 0.999)                   # after each step
    with averaged(ds_engine): ...  # forward computes with the average; afterwards with the weights, bit for bit

It is stored with the optimizer's moments and partitioned like them (trainer/engine/fragments.py).
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
    """ema <- decay * ema + (1 - decay) * weight, on this rank's elements; the first call, after the first update,
    copies the weights. ``decay`` 0 drops the average. No communication.
    """
    for fragment in fragments(engine):
        # A parameter without a gradient so far has no state and must not get one: the optimizer creates the moments of
        # parameters without state.
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
    """Within the block, forward uses the average wherever there is one; yields whether there is any. Call it on all
    ranks, between steps.

    There is no second copy of the model: the weights are restored from the optimizer's copy.
    """
    pieces = [piece for piece in fragments(engine) if AVERAGE in piece.kinds()]
    _show(engine, pieces, AVERAGE)
    yield bool(pieces)
    # Not after an error: the other ranks may not reach this collective; the run ends with the error instead.
    _show(engine, pieces, WEIGHT)


@torch.no_grad()
def _show(engine: Any, pieces: list[Fragment], kind: str) -> None:
    """Writes the average, or the weights, to where forward reads them. Needs the memory of one bucket (at ZeRO 0: of
    one parameter)."""
    for piece in pieces:
        if piece.master is piece.parameter:  # ZeRO 0 has no other copy of the weights: swap the two, in both directions
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
        if world_size() > 1:  # as integers: all addends but one are 0, so the bits are unchanged
            dist.all_reduce(buffer.view(torch.int32))
        for span, part in zip(bucket, parts, strict=True):
            write_model_copy(span, part)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.invalidate_secondary_tensor()  # ZeRO++ keeps a second copy of the weights within a node
