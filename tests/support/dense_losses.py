"""The losses as one would write them on one machine in float64 with all logits at once: what trainer/losses is tested
against.

Each takes the global batch, float64 leaves, and returns the global loss; ``check`` runs the real thing on ranks and
compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.support.forked_ranks import run_ranks
from trainer.core.types import Embeddings
from trainer.losses import PairLoss

Dense = Callable[[Embeddings], Tensor]


def batch(
    rows: int,
    width: int = 32,
    t: float = 10.0,
    b: float = -10.0,
    dtype: torch.dtype = torch.float32,
    near: float = 1.0,
    seed: int = 0,
) -> Embeddings:
    """Normalised pairs whose cosine is around ``near`` / sqrt(1 + near^2); groups repeat; scale is [1], bias []."""
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    image = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
    noise = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
    text = F.normalize(noise + near * image, dim=1)
    groups = torch.randint(0, max(2, rows * 2 // 3), (rows,), generator=generator) * 2**40
    return Embeddings(image.to(dtype), text.to(dtype), torch.tensor([t]), torch.tensor(b), groups)


def logits(z: Embeddings) -> Tensor:
    return z.scale * z.image @ z.text.T + z.bias


def eye(z: Embeddings) -> Tensor:
    return torch.eye(z.image.shape[0], dtype=torch.bool)


def same(z: Embeddings) -> Tensor:
    assert z.groups is not None
    return z.groups[:, None] == z.groups[None, :]


def sigmoid(z: Embeddings, positives: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    positives = eye(z) if positives is None else positives
    terms = F.softplus(torch.where(positives, -logits(z), logits(z)), threshold=1000)
    return (terms if weight is None else terms * weight).sum() / z.image.shape[0]


def softmax(z: Embeddings, smoothing: float = 0.0) -> Tensor:
    target = torch.arange(z.image.shape[0])
    cross = [F.cross_entropy(values, target, label_smoothing=smoothing) for values in (logits(z), logits(z).T)]
    return (cross[0] + cross[1]) / 2


def take(z: Embeddings, sizes: list[int], rank: int) -> Embeddings:
    """A rank's part of the global batch, leaves that take gradients."""
    first = sum(sizes[:rank])
    part = slice(first, first + sizes[rank])
    leaves = [value.clone().requires_grad_() for value in (z.image[part], z.text[part], z.scale, z.bias)]
    groups, ids = (None if extra is None else extra[part] for extra in (z.groups, z.ids))
    return Embeddings(*leaves, groups, ids=ids)


def on_ranks(
    make: Callable[[], PairLoss], batches: list[Embeddings], sizes: list[int]
) -> list[tuple[float, list[Tensor], dict[str, int]]]:
    """[(loss, gradients, traffic) for each batch] of this rank; runs inside ``run_ranks``."""
    results = []
    loss = make()
    for z in batches:
        mine = take(z, sizes, dist.get_rank() if dist.is_initialized() else 0)
        loss.traffic.clear()
        value = loss(mine)
        value.backward()
        gradients = [leaf.grad for leaf in mine[:4]]
        results.append((value.item(), gradients, dict(loss.traffic)))
    return results


def errors(
    make: Callable[[], PairLoss], dense: Dense, batches: list[Embeddings], sizes: list[int]
) -> list[dict[str, float]]:
    """Relative errors of the loss and of each gradient (in norm), for each batch, on len(sizes) ranks."""
    ranks = run_ranks(on_ranks, len(sizes), make, batches, sizes)
    world, found = len(sizes), []
    for number, z in enumerate(batches):
        truth = Embeddings(*[value.double().requires_grad_() for value in z[:4]], z.groups, ids=z.ids)
        loss = dense(truth)
        gradients = torch.autograd.grad(loss, truth[:4], materialize_grads=True)
        parts = [rank[number] for rank in ranks]
        # Ranks average losses and gradients, as data-parallel training does.
        image, text = (torch.cat([part[1][side] for part in parts]) / world for side in (0, 1))
        scale, bias = (sum(part[1][side] for part in parts) / world for side in (2, 3))
        assert scale.shape == z.scale.shape and bias.shape == z.bias.shape
        mine = {
            "loss": torch.tensor(sum(part[0] for part in parts) / world, dtype=torch.float64),
            "image": image,
            "text": text,
            "scale": scale,
            "bias": bias,
        }
        wanted = dict(zip(mine, (loss.detach(), *gradients), strict=True))
        found.append({name: relative(mine[name], wanted[name]) for name in mine})
    return found


def relative(value: Any, truth: Tensor) -> float:
    """|value - truth| / |truth|; the absolute error where the truth is zero but for float64 rounding (softmax's
    bias)."""
    difference, size = (value.double() - truth).norm().item(), truth.norm().item()
    return difference / size if size > 1e-13 else difference


def rounded_to_bfloat16(z: Embeddings, dense: Dense) -> dict[str, float]:
    """Relative errors of the loss and its gradients when nothing but the embeddings is rounded, float64 elsewhere."""

    def values(image: Tensor, text: Tensor) -> list[Tensor]:
        leaves = [value.double().requires_grad_() for value in (image, text, z.scale, z.bias)]
        loss = dense(Embeddings(*leaves, z.groups))
        return [loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    exact, rounded = values(z.image, z.text), values(z.image.bfloat16(), z.text.bfloat16())
    names = ("loss", "image", "text", "scale", "bias")
    return {name: relative(a, b) for name, a, b in zip(names, rounded, exact, strict=True)}
