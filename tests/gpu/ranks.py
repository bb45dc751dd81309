"""One rank of the lines for several cards: ``torchrun -m tests.gpu.ranks exact|overlap EXCHANGE``."""

from __future__ import annotations

import json
import sys

import torch

from tests.gpu.checks import seconds
from tests.gpu.speed import embeddings, forward_backward
from tests.support import dense_losses
from trainer.core import distributed
from trainer.core.types import Embeddings
from trainer.losses import SigmoidLoss


def exact(exchange: str) -> dict[str, float]:
    """Errors of loss and gradients on unequal local batches against float64, all ranks together."""
    world, rank = distributed.world_size(), distributed.rank()
    sizes = [300 + 17 * other for other in range(world)]
    z = dense_losses.batch(sum(sizes), 96)
    mine = dense_losses.take(z, sizes, rank)
    leaves = [value.detach().to(distributed.device()).requires_grad_() for value in mine[:4]]
    loss = SigmoidLoss(tile_rows=128, exchange=exchange, node_size=max(1, world // 2))  # type: ignore[arg-type]
    value = loss(Embeddings(*leaves))
    value.backward()
    truth = Embeddings(*[field.double().requires_grad_() for field in z[:4]])
    gradients = torch.autograd.grad(dense_losses.sigmoid(truth), truth[:4])
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    found = {
        name: dense_losses.relative(leaf.grad.cpu() / world, wanted[part])
        for name, leaf, wanted in zip(("image", "text"), leaves[:2], gradients[:2], strict=True)
    }
    worst = torch.tensor(list(found.values()), device=distributed.device())
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(found, worst.tolist(), strict=True))


def overlap(exchange: str) -> dict[str, float]:
    """Seconds of the ring, and of one rank's tiles against as many columns of its own."""
    rows, world = 4096, distributed.world_size()
    z, loss = embeddings(rows, torch.bfloat16), SigmoidLoss(exchange=exchange)  # type: ignore[arg-type]
    ring = seconds(lambda: forward_backward(loss, z))
    alone = SigmoidLoss(group=torch.distributed.new_group([distributed.rank()], use_local_synchronization=True))
    return {"ring": ring, "alone": world * seconds(lambda: forward_backward(alone, z))}


if __name__ == "__main__":
    distributed.init(100)
    answer = {"exact": exact, "overlap": overlap}[sys.argv[1]](sys.argv[2])
    if distributed.is_main():
        print(json.dumps(answer))
    distributed.shutdown()
