"""What the examples train: two towers of a few thousand weights on noise. Yours go in their place."""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 8
"""Pairs of each rank."""


class TwoTowers(nn.Module):
    """Returns what a contrastive loss needs, from ``forward``: a wrapper (DDP, FSDP2, ...) sees every parameter
    used."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.GELU(), nn.Linear(32, width))
        self.text = nn.Sequential(nn.Embedding(50, 32), nn.Flatten(), nn.Linear(6 * 32, width))
        self.logit_scale = nn.Parameter(torch.tensor([2.3]))  # one dimension: FSDP2 and DeepSpeed take no scalars
        self.logit_bias = nn.Parameter(torch.tensor([-2.0]))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias + 0.0,
        }


def global_batch(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """``rows`` pairs, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.randint(50, (rows, 6), generator=generator)


def local_batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's ROWS pairs of step ``step``."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, texts = global_batch(step, ROWS * world)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    return images[mine], texts[mine]


def join() -> None:
    """The process group that a launcher describes, where nobody has joined it yet."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
