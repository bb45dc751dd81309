"""SigLIP 2's NaFlex models (arXiv 2502.14786), which read a list of patches with the shape of its grid: any aspect, any
resolution.

    model: {path: google/siglip2-base-patch16-naflex, num_patches: 256}

Images come as strips of patches (trainer/data/patches.py): each has at most ``model.num_patches`` in its own aspect;
padding is masked. A batch is a fixed number of pairs, as for every other model, so the order of samples stays exact;
the cost is that of ``num_patches`` per image, padding included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAFLEX = "siglip2"


def unpack(strips: Tensor) -> tuple[Tensor, Tensor]:
    """[b, 3, p, (n + 1) p] uint8 -> (patches [b, 3, n, p, p] uint8, grids [b, 2] int64: rows and columns, at least
    1)."""
    rows, channels, patch, width = strips.shape
    budget = width // patch - 1
    patches = strips[..., : budget * patch].reshape(rows, channels, patch, budget, patch).transpose(2, 3)
    high_low = strips[:, 0, 0, budget * patch : budget * patch + 4].long().reshape(rows, 2, 2)
    return patches, (256 * high_low[..., 0] + high_low[..., 1]).clamp(min=1)  # a blank strip is an image of one patch


def patch_inputs(patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
    """[b, 3, n, p, p] normalised, [b, 2] -> pixel_values [b, n, 3 p²], their mask [b, n] and grid shapes, as
    Siglip2Model wants them."""
    rows, channels, budget, patch, _ = patches.shape
    values = patches.permute(0, 2, 3, 4, 1).reshape(rows, budget, patch * patch * channels)
    mask = torch.arange(budget, device=patches.device) < grids.prod(dim=1, keepdim=True)
    return {"pixel_values": values * mask[:, :, None], "pixel_attention_mask": mask.long(), "spatial_shapes": grids}


def budget_of(processor: Any, config: Any, wanted: int | None) -> int:
    """Largest number of patches per image: from the recipe, else from the checkpoint's image processor, else the
    number of positions."""
    return int(wanted or getattr(processor, "max_num_patches", None) or config.vision_config.num_patches)
