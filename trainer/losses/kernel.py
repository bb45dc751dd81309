"""Triton: one tile of the sigmoid loss on a GPU, from embeddings to the gradient of its logits in one kernel.

A program multiplies a block of images with a block of texts on the tensor cores (float16 operands, float32 sums), turns
the logits t x u^T + b in its registers into their gradient, and leaves that as float16 in the tile, together with the
block's sums of loss and gradient: logits never reach memory. The two products with the gradient stay with cuBLAS.

The slow reference is ``sigmoid.py`` without it. Its arithmetic is that of ``loss.precision: fast``: tensor cores cut
off their sums (measured on an H100: 1e-6 of a sum of 768 products, 5e-6 of 4,096), so that ``exact`` cannot use them.

    TRITON_INTERPRET=1 python -m pytest tests/test_losses_kernel.py    # on a CPU
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp2(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^x by the GPU's own instruction; Triton's surrounds it with a dozen for subnormal numbers, which do not count
    here. The same for _inverse and _log2. Its interpreter knows no instructions."""
    if HARDWARE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def _inverse(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    if HARDWARE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def _log2(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def _join(u, v):  # type: ignore[no-untyped-def]
    """(1 - u)(1 - v) = 1 - join(u, v), which keeps the digits of small u and v."""
    return u + v - u * v


@triton.jit
def _sum_of_logarithms(u, R: tl.constexpr, C: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """sum -log2(1 - u) of u [R, C] in [0, 1/2]: eight terms share a logarithm."""
    u = tl.reduce(tl.reshape(u, (R, C // 2, 2)), 2, _join)
    u = tl.reduce(tl.permute(tl.reshape(u, (R, 2, C // 4)), (0, 2, 1)), 2, _join)
    u = tl.reduce(tl.permute(tl.reshape(u, (R, 2, C // 8)), (0, 2, 1)), 2, _join)
    # Near 1 the logarithm's error is absolute, 2^-22: there the series has more digits.
    series = u * LOG2E * (1.0 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return tl.sum(tl.where(u < 0.03, series, -_log2(1.0 - u, HARDWARE)))


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
    power,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    # Blocks are visited in bands of GROUP rows, so that those which run at once share operands in the L2 cache.
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, R), tl.cdiv(columns, C)
    band = program // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    first_row = (band * GROUP + program % (GROUP * across) % height) * R
    first_column = program % (GROUP * across) // height * C
    cosines = tl.zeros((R, C), dtype=tl.float32)
    for k in range(0, width, D):
        cosines = tl.dot(images.load([first_row, k]), texts.load([first_column, k]).T, cosines)
    row, column = first_row + tl.arange(0, R), first_column + tl.arange(0, C)
    # In units of log 2: exp2 and log2 are what the hardware has.
    z = cosines * (tl.load(scale) * LOG2E) + tl.load(bias) * LOG2E
    if not EVEN:
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        z = tl.where(inside, z, float("-inf"))
    # Every pair counts as a negative here; the few matched ones are corrected below.
    matched = row + shift
    on_diagonal = (first_row + shift < first_column + C) & (first_row + R + shift > first_column)
    own = tl.zeros((R,), dtype=tl.float32)
    if on_diagonal:
        own = tl.sum(tl.where(column[None, :] == matched[:, None], z, 0.0), 1)
    value = _inverse(1.0 + _exp2(-z, HARDWARE), HARDWARE)
    place = gradient + row.to(tl.int64)[:, None] * columns + column[None, :]
    if EVEN:
        tl.store(place, (value * power).to(gradient.dtype.element_ty))
    else:
        tl.store(place, (value * power).to(gradient.dtype.element_ty), mask=inside)
    # softplus(z) = max(z, 0) - log(1 - u), u = sigmoid(-|z|)
    loss = tl.sum(tl.maximum(z, 0.0)) + _sum_of_logarithms(tl.minimum(value, 1.0 - value), R, C, HARDWARE)
    total = tl.sum(value)
    if on_diagonal:
        here = (row < rows) & (matched >= first_column) & (matched < tl.minimum(first_column + C, columns))
        # d softplus(-z) / dz = -sigmoid(-z) = sigmoid(z) - 1, and softplus(-z) = softplus(z) - z.
        corrected = -1.0 / (1.0 + tl.exp2(own))
        tl.debug_barrier()  # another thread may have stored the place
        tl.store(
            gradient + row.to(tl.int64) * columns + matched,
            (corrected * power).to(gradient.dtype.element_ty),
            mask=here,
        )
        loss -= tl.sum(tl.where(here, own, 0.0))
        total -= tl.sum(here.to(tl.float32))
    tl.store(losses + program, loss / LOG2E)
    tl.store(sums + program, total)


class _Blocks(NamedTuple):
    """Images, texts and width of a block; warps of a program, and loads in flight."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


HOPPER, AMPERE, INTERPRETED = _Blocks(128, 256, 64, 8, 3), _Blocks(128, 128, 32, 8, 3), _Blocks(32, 32, 32, 4, 1)


def blocks_for(device: torch.device) -> _Blocks | None:
    """The blocks for this card; None before Ampere (V100, T4), for whose tensor cores Triton makes no code."""
    if device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0]
    return None if major < 8 else HOPPER if major in (9, 10) else AMPERE


def sigmoid_tile(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, out: Tensor, shift: int | None, power: float
) -> tuple[Tensor, Tensor]:
    """Writes ``power`` x d loss / d logits into ``out`` [r, c] and returns the sums of loss and of that gradient
    (without ``power``), float64 [] each.

    ``images`` [r, d], ``texts`` [c, d] and ``out``: contiguous float16, d a multiple of 8; ``scale`` [] and ``bias`` []
    float32. Image i belongs to text i + ``shift`` of this slice; None when no pair here is matched.
    """
    (rows, width), columns = images.shape, texts.shape[0]
    block = blocks_for(out.device)
    assert block is not None and width % 8 == 0
    programs = triton.cdiv(rows, block.rows) * triton.cdiv(columns, block.columns)
    losses, sums = torch.empty(2, programs, dtype=torch.float32, device=out.device)
    _sigmoid_tile[(programs,)](
        TensorDescriptor.from_tensor(images, [block.rows, block.width]),
        TensorDescriptor.from_tensor(texts, [block.columns, block.width]),
        scale,
        bias,
        out,
        losses,
        sums,
        rows,
        columns,
        width,
        columns + rows if shift is None else shift,
        power,
        R=block.rows,
        C=block.columns,
        D=block.width,
        GROUP=8,
        EVEN=rows % block.rows == 0 and columns % block.columns == 0,
        HARDWARE=out.is_cuda,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return losses.sum(dtype=torch.float64), sums.sum(dtype=torch.float64)
