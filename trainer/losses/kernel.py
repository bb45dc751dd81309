"""Triton: one tile of the sigmoid loss in one pass over its logits, on a GPU.

A program makes a block of logits t x u^T + b, and leaves their gradient in the tile together with the block's sums of
loss and gradient: the logits themselves never reach memory. The two products with that gradient stay with the vendor's
library. Embeddings come in float32; ``tf32`` is for those that were bfloat16, whose values tf32 holds exactly. The slow
reference is ``sigmoid.py`` without it.

Checked by Triton's interpreter on CPUs (TRITON_INTERPRET=1); never run or timed on a GPU so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH = 64, 64, 32


@triton.jit
def _sigmoid_tile(  # type: ignore[no-untyped-def]
    images,
    texts,
    scale,
    bias,
    gradient,
    losses,
    sums,
    rows,
    columns,
    width,
    shift,
    TF32: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    cosines = tl.zeros((R, C), dtype=tl.float32)
    for start in range(0, width, D):
        k = start + tl.arange(0, D)
        x = tl.load(
            images + row[:, None] * width + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < width), other=0.0
        )
        u = tl.load(
            texts + column[:, None] * width + k[None, :],
            mask=(column[:, None] < columns) & (k[None, :] < width),
            other=0.0,
        )
        if TF32:
            cosines = tl.dot(x, tl.trans(u), cosines, input_precision="tf32")
        else:
            cosines = tl.dot(x, tl.trans(u), cosines, input_precision="ieee")
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    matched = column[None, :] == row[:, None] + shift
    sign = tl.where(matched, -1.0, 1.0)
    # For matched pairs -z, as in the reference: softplus and sigmoid keep their digits where they are small.
    z = sign * (cosines * tl.load(scale) + tl.load(bias))
    small = tl.exp(-tl.abs(z))
    # log(1 + e) to full precision for small e (log1p is not in every Triton): log(w) e / (w - 1) with w = fl(1 + e).
    w = 1.0 + small
    log1p = tl.where(w == 1.0, small, tl.log(w) * (small / tl.where(w == 1.0, 1.0, w - 1.0)))
    loss = tl.where(inside, tl.maximum(z, 0.0) + log1p, 0.0)
    value = tl.where(inside, sign * tl.where(z >= 0, 1.0, small) / w, 0.0)
    tl.store(gradient + row[:, None] * columns + column[None, :], value, mask=inside)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + place, tl.sum(tl.sum(loss, 1), 0))
    tl.store(sums + place, tl.sum(tl.sum(value, 1), 0))


def sigmoid_tile(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, out: Tensor, shift: int | None, tf32: bool
) -> tuple[Tensor, Tensor]:
    """Writes d loss / d logits into ``out`` [r, c] and returns the sums of loss and of that gradient, float64 [] each.

    ``images`` [r, d], ``texts`` [c, d], ``scale`` [], ``bias`` [] and ``out``: contiguous float32. Image i belongs to
    text i + ``shift`` of this slice; None when no pair here is matched.
    """
    (rows, width), columns = images.shape, texts.shape[0]
    grid = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS)
    losses, sums = torch.empty(2, grid[0] * grid[1], dtype=torch.float32, device=out.device)
    nowhere = columns + rows
    _sigmoid_tile[grid](
        images,
        texts,
        scale,
        bias,
        out,
        losses,
        sums,
        rows,
        columns,
        width,
        nowhere if shift is None else shift,
        TF32=tf32,
        R=BLOCK_ROWS,
        C=BLOCK_COLUMNS,
        D=BLOCK_WIDTH,
    )
    return losses.sum(dtype=torch.float64), sums.sum(dtype=torch.float64)
