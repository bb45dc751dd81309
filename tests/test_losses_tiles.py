"""A sweep never waits for the device and never leaves it: on the meta device asking for a value raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.core.types import Embeddings
from trainer.losses import (
    AffinityLoss,
    NegativeSettings,
    PairLoss,
    QueueLoss,
    SigmoidLoss,
    SinkhornLoss,
    SoftmaxLoss,
    TripletLoss,
)
from trainer.losses.tiles import Pairs
from trainer.losses.topology import Ring

WORLD, ROWS, WIDTH = 4, 2048, 64


class Finished:
    def wait(self) -> None: ...


class Devices(TorchDispatchMode):
    """Notes operations that mix tensors of two devices: a copy from or to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor) and one.dim() > 0]
        if len({one.device.type for one in tensors}) > 1:
            self.mixed.append(str(function))
        return result


@contextmanager
def on_nccl(world: int) -> Iterator[None]:
    """What a loss asks outside of its sweeps (sizes, memory, empty blocks) is answered; transfers do nothing."""

    def operation(op: Any, tensor: Tensor, group: Any = None, group_peer: int = -1) -> None:
        assert tensor.is_contiguous() and tensor.device.type == "meta", (tensor.device, tensor.shape)

    def reraise(_: Ring, error: BaseException | None) -> None:
        if error is not None:
            raise error

    with ExitStack() as stack:
        for target, name, value in (
            (dist, "is_initialized", lambda: world > 1),
            (dist, "get_rank", lambda group=None: 0),
            (dist, "get_world_size", lambda group=None: world),
            (dist, "get_backend", lambda group=None: "nccl"),
            (dist, "P2POp", operation),
            (dist, "batch_isend_irecv", lambda operations: [Finished()]),
            (dist, "all_reduce", lambda *_, **__: None),
            (Ring, "_agree", lambda _, rows, lanes, signature: ([rows] * world, [lanes] * world)),
            (Ring, "check_memory", reraise),
            (Pairs, "_refuse_empty_blocks", lambda _: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


def evaluate(loss: PairLoss, dtype: torch.dtype, groups: bool = False, teacher: bool = False) -> Devices:
    """One evaluation with all gradients on the meta device."""
    meta = torch.device("meta")
    loss.to(meta)
    with torch.no_grad(), Devices() as devices:
        z = Embeddings(
            torch.empty(ROWS, WIDTH, dtype=dtype, device=meta),
            torch.empty(ROWS, WIDTH, dtype=dtype, device=meta),
            torch.empty(1, device=meta),
            torch.empty(1, device=meta),
            torch.empty(ROWS, dtype=torch.int64, device=meta) if groups else None,
            Embeddings(*(torch.empty(ROWS, 32, device=meta) for _ in range(2)), torch.empty(1, device=meta), torch.empty(1, device=meta)) if teacher else None,
        )  # fmt: skip
        value, gradients = loss.evaluate(z, [True] * 4)
    assert {one.device.type for one in (value, *gradients) if one is not None} == {"meta"}
    return devices


LOSSES: list[tuple[str, Callable[[], PairLoss], dict[str, Any]]] = [
    ("ring", SigmoidLoss, {}),
    ("bidirectional", lambda: SigmoidLoss(exchange="bidirectional"), {}),
    ("gather", lambda: SigmoidLoss(exchange="gather"), {}),
    ("hierarchical", lambda: SigmoidLoss(exchange="hierarchical", node_size=2), {}),
    ("bf16 transfers", lambda: SigmoidLoss(comm_dtype="bfloat16", comm_gradient_dtype="bfloat16"), {}),
    ("bf16", SigmoidLoss, {"dtype": torch.bfloat16}),
    ("groups", lambda: SigmoidLoss(same_group="mask"), {"groups": True}),
    ("random", lambda: SigmoidLoss(negatives=NegativeSettings(ratio=16)), {}),
    ("hardest", lambda: SigmoidLoss(negatives=NegativeSettings(keep="hardest", ratio=16)), {}),
    ("hardest, groups", lambda: SigmoidLoss(same_group="mask", negatives=NegativeSettings(keep="easiest", ratio=4)), {"groups": True}),
    ("softmax", SoftmaxLoss, {}),
    ("softmax, groups", lambda: SoftmaxLoss(label_smoothing=0.1, same_group="positive"), {"groups": True}),
    ("queue", lambda: QueueLoss(width=WIDTH, size=3000), {}),
    ("sinkhorn", SinkhornLoss, {}),
    ("triplet", TripletLoss, {}),
    ("distill", AffinityLoss, {"teacher": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "inputs"), LOSSES, ids=[name for name, *_ in LOSSES])
def test_no_sweep_waits_for_the_device(name: str, make: Callable[[], PairLoss], inputs: dict[str, Any]) -> None:
    with on_nccl(WORLD):
        assert evaluate(make(), **{"dtype": torch.float32} | inputs).mixed == []


def test_what_would_wait_is_seen() -> None:
    class Waits(SigmoidLoss):
        def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
            total = super().objective(pairs, image_gradient, text_gradient)
            return total * float(total)

    with on_nccl(WORLD), pytest.raises(RuntimeError, match="meta"):
        evaluate(Waits(), torch.float32)
