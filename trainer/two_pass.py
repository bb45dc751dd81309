"""The two-pass step for other training loops: a batch of any size in the memory of a micro-batch.

    value = two_pass(model, (images, texts), loss, micro_batch=64)         # model may be wrapped in DDP or FSDP2
    optimizer.step()

Gradient caching (Gao et al., arXiv 2101.06983): pass 1 embeds the batch in micro-batches without gradient; the loss
runs ONCE on all embeddings; pass 2 embeds again, with the same random numbers, and backpropagates the inner product of
embeddings and their gradients. trainer/step.py does the same with a DeepSpeed engine and recovers from out-of-memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.types import UserError
from trainer.engine.rng import RandomState

Outputs = Mapping[str, Tensor] | Sequence[Tensor]


def two_pass(
    encode: Callable[..., Outputs],
    batch: Sequence[Tensor],
    loss: Callable[..., Tensor],
    *,
    micro_batch: int,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """Adds the exact gradient of ``loss`` on the local ``batch`` to the parameters that ``encode`` uses.

    The result does not depend on ``micro_batch``. All ranks call it together, with equal batches and micro-batches.
    Layers that mix samples (batch norm in training) would make the result depend on it and are not supported.

    Args:
        encode: the model, wrapped or not, or any function of two encoders. Given the same rows of each tensor of
            ``batch`` it returns a mapping or a sequence: tensors of two or more dimensions have a row for each pair,
            others (scale, bias) are the same for every micro-batch.
        batch: tensors with one row per pair of this rank.
        loss: called once, as ``loss(**outputs)`` for a mapping and ``loss(*outputs)`` for a sequence; returns a scalar.
        micro_batch: rows per call of ``encode``; if that is the whole batch, there is one pass only.
        backward: called instead of ``Tensor.backward``: ``fabric.backward``, ``accelerator.backward``,
            ``lambda loss: scaler.scale(loss).backward()``.
        no_sync: returns a context in which gradients are not averaged over ranks, for all micro-batches but the last.
            None: that of ``encode`` if it is DDP or FSDP2; otherwise every micro-batch averages (correct, but slower).

    Returns:
        The loss, detached; with RingLIP's losses this rank's share, whose mean over ranks is the global loss.

    Raises:
        UserError: tensors of unequal length, an empty batch, or an ``encode`` that does not return a row per pair.
    """
    rows = _rows(batch)
    if micro_batch < 1:
        raise UserError(f"two_pass: micro_batch is {micro_batch}; it must be 1 or more")
    if micro_batch >= rows:
        value = _apply(loss, encode(*batch))
        backward(value)
        return value.detach()
    slices = [slice(start, min(start + micro_batch, rows)) for start in range(0, rows, micro_batch)]
    leaves, states = _embed(encode, batch, slices)
    value = _apply(loss, leaves)
    value.backward()  # for the leaves only: involves neither a wrapper nor a loss scale
    device = _device(batch)
    after = RandomState.take(device)
    quiet = no_sync or _quiet(encode)
    for part, state in zip(slices, states, strict=True):
        last = part is slices[-1]
        with nullcontext() if last else quiet():
            state.restore(device)
            outputs = encode(*(tensor[part] for tensor in batch))
            backward(_surrogate(outputs, leaves, part, last))
    after.restore(device)
    return value.detach()


def _rows(batch: Sequence[Tensor]) -> int:
    lengths = {tensor.shape[0] for tensor in batch}
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(f"two_pass: the tensors of a batch must have one length above 0, these have {sorted(lengths)}")
    return lengths.pop()


def _items(outputs: Outputs) -> list[tuple[Any, Tensor]]:
    return list(outputs.items()) if isinstance(outputs, Mapping) else list(enumerate(outputs))


def _apply(loss: Callable[..., Tensor], outputs: Any) -> Tensor:
    return loss(**outputs) if isinstance(outputs, Mapping) else loss(*outputs)


def _device(batch: Sequence[Tensor]) -> torch.device:
    """The device that draws random numbers: the batch may still be in host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return batch[0].device


@torch.no_grad()
def _embed(
    encode: Callable[..., Outputs], batch: Sequence[Tensor], slices: list[slice]
) -> tuple[Outputs, list[RandomState]]:
    """Pass 1: the outputs of ``encode`` for the local batch as leaves, and the random state before each micro-batch."""
    rows, device = slices[-1].stop, _device(batch)
    states: list[RandomState] = []
    joined: dict[Any, Tensor] = {}
    mapping = False
    for part in slices:
        states.append(RandomState.take(device, states[-1] if states else None))
        outputs = encode(*(tensor[part] for tensor in batch))
        mapping = isinstance(outputs, Mapping)
        for key, value in _items(outputs):
            if value.dim() < 2:
                joined[key] = value
                continue
            if value.shape[0] != part.stop - part.start:
                raise UserError(
                    f"two_pass: encode returned {key!r} of shape {list(value.shape)} for {part.stop - part.start} "
                    "pairs; "
                    f"what has two or more dimensions needs a row for each pair"
                )
            joined.setdefault(key, value.new_empty(rows, *value.shape[1:], dtype=_wide(value.dtype)))[part] = value
    leaves = {key: value.detach().clone().requires_grad_(value.is_floating_point()) for key, value in joined.items()}
    return (leaves if mapping else [leaves[key] for key in sorted(leaves)]), states


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, which would round the gradients for pass 2."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _surrogate(outputs: Outputs, leaves: Outputs, part: slice, last: bool) -> Tensor:
    """The inner product of outputs and their gradients, which has the gradient of the loss. Scale and bias are in the
    last micro-batch only, in whose backward pass wrappers expect every parameter."""
    terms = []
    for (_, value), (_, leaf) in zip(_items(outputs), _items(leaves), strict=True):
        gradient = leaf.grad
        if gradient is None or not value.requires_grad or (value.dim() < 2 and not last):
            continue
        terms.append(torch.sum(value.to(leaf.dtype) * (gradient[part] if value.dim() >= 2 else gradient)))
    if not terms:
        raise UserError("two_pass: no output of encode needs a gradient: every parameter is locked")
    return torch.stack(terms).sum()


def _quiet(encode: Callable[..., Outputs]) -> Callable[[], AbstractContextManager[Any]]:
    """The ``no_sync`` context of ``encode``'s wrapper."""
    if not isinstance(encode, nn.Module):
        return nullcontext
    switch = getattr(encode, "set_requires_gradient_sync", None)
    if switch is not None:  # FSDP2

        @contextmanager
        def unsharded() -> Any:
            switch(False)
            try:
                yield
            finally:
                switch(True)

        return unsharded
    return getattr(encode, "no_sync", nullcontext)
