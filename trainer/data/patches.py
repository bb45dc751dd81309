"""Images in their native aspect for SigLIP 2's NaFlex models (arXiv 2502.14786): a strip of patches instead of a
rectangle.

All tensors of a batch have one shape, and its number of pairs is fixed, because the global order of samples must not
depend on the images. So the number of patches per image is capped: each image is resized, in its own aspect, to
at most ``budget`` patches, which are laid side by side, row by row, in [3, patch, (budget + 1) patch], padded with
zeros. The last patch stores the grid: rows and columns as two bytes each.

    Preprocess(image_size=(16, (256 + 1) * 16), resize="patches", ...)         # patch 16, budget 256
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.core.types import Preprocess

PRECISION = 1e-5
LARGEST = 100.0


def grid_of(preprocess: Preprocess) -> tuple[int, int]:
    """(Side of a patch in pixels, largest number of patches of an image)."""
    patch, width = preprocess.image_size
    return patch, width // patch - 1


def grid_size(strip: NDArray[np.uint8], patch: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of the image in a strip [3, patch, (budget + 1) patch]."""
    high_rows, low_rows, high_columns, low_columns = strip[0, 0, budget * patch : budget * patch + 4].tolist()
    return high_rows << 8 | low_rows, high_columns << 8 | low_columns


def native_size(shape: tuple[int, int], patch: int, budget: int) -> tuple[int, int]:
    """(height, width) in whole patches, at most ``budget`` of them, closest to the aspect of ``shape``: exactly the
    sizes that SigLIP 2's image processor finds by bisecting the scale.
    """
    low, high = PRECISION / 10, LARGEST
    while high - low >= PRECISION:
        middle = (low + high) / 2
        rows, columns = (_patches(side, middle, patch) for side in shape)
        low, high = (middle, high) if rows * columns <= budget else (low, middle)
    return _patches(shape[0], low, patch) * patch, _patches(shape[1], low, patch) * patch


def _patches(side: int, scale: float, patch: int) -> int:
    return max(1, math.ceil(side * scale / patch))


def pack(planes: torch.Tensor, patch: int, budget: int) -> torch.Tensor:
    """[3, height, width] uint8 in whole patches -> [3, patch, (budget + 1) patch]."""
    rows, columns = planes.shape[1] // patch, planes.shape[2] // patch
    assert rows * columns <= budget, (rows, columns, budget)
    strip = torch.zeros(3, patch, (budget + 1) * patch, dtype=torch.uint8)
    patches = planes.reshape(3, rows, patch, columns, patch).permute(0, 2, 1, 3, 4)
    strip[:, :, : rows * columns * patch] = patches.reshape(3, patch, rows * columns * patch)
    strip[0, 0, budget * patch : budget * patch + 4] = torch.tensor(
        [rows >> 8, rows & 255, columns >> 8, columns & 255]
    )
    return strip
