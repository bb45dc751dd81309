"""Triton: one tile of the sigmoid loss on a GPU, from embeddings to the gradient of its logits in one kernel.

A program multiplies blocks of images and texts on the tensor cores (float16 operands, float32 sums), turns the logits
t x u^T + b in its registers into their gradient, and leaves that as float16 in the tile, beside its sums of loss and
gradient: logits never reach memory. The two products with the gradient stay with cuBLAS.

The slow reference is ``sigmoid.py`` without it. The arithmetic is that of ``loss.precision: fast``; ``exact`` cannot be
had from tensor cores, which cut off their sums (measured on an H100: by 1e-6 of a sum of 768 products, 5e-6 of 4,096).

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
    else:
        return tl.exp2(x)


@triton.jit
def _inverse(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    if HARDWARE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def _log2(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
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
def _load(source, first, k, count, width, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
    """[N, D] of ``source`` [count, width] from ``first`` and ``k`` on, zero beyond its edges."""
    if TMA:
        return source.load([first, k])
    else:
        row, column = first + tl.arange(0, N), k + tl.arange(0, D)
        inside = (row[:, None] < count) & (column[None, :] < width)
        return tl.load(source + row[:, None] * width + column[None, :], mask=inside, other=0.0)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    cosines,
    t,
    b,
    gradient,
    rows,
    columns,
    first_row,
    first_column,
    power,
    R: tl.constexpr,
    C: tl.constexpr,
    EVEN: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Stores the gradient of a block; returns its sums of loss, in units of log 2, and of gradient."""
    row, column = first_row + tl.arange(0, R), first_column + tl.arange(0, C)
    z = cosines * t + b
    place = gradient + row.to(tl.int64)[:, None] * columns + column[None, :]
    if EVEN:
        value = _inverse(1.0 + _exp2(-z, HARDWARE), HARDWARE)
        tl.store(place, (value * power).to(gradient.dtype.element_ty))
    else:
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        z = tl.where(inside, z, float("-inf"))
        value = _inverse(1.0 + _exp2(-z, HARDWARE), HARDWARE)
        tl.store(place, (value * power).to(gradient.dtype.element_ty), mask=inside)
    # softplus(z) = max(z, 0) - log(1 - u), u = sigmoid(-|z|)
    loss = tl.sum(tl.maximum(z, 0.0)) + _sum_of_logarithms(tl.minimum(value, 1.0 - value), R, C, HARDWARE)
    return loss, tl.sum(value)


@triton.jit
def _sigmoid_tile(  # type: ignore[no-untyped-def]
    images,
    texts,
    scale,
    bias,
    gradient,
    sums,
    rows,
    columns,
    width,
    power,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    # In units of log 2, since exp2 and log2 are what the hardware has.
    t, b = tl.load(scale) * LOG2E, tl.load(bias) * LOG2E
    down, across = tl.cdiv(rows, R), tl.cdiv(columns, C)
    loss, total = 0.0, 0.0
    for block in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=PERSISTENT):
        # Blocks are visited in bands of rows, so that those which run at once share operands in the L2 cache.
        band = block // (BAND * across)
        height = tl.minimum(down - band * BAND, BAND)
        i = (band * BAND + block % (BAND * across) % height) * R
        j = block % (BAND * across) // height * C
        cosines = tl.zeros((R, C), dtype=tl.float32)
        for k in range(0, width, D):
            x, u = _load(images, i, k, rows, width, R, D, TMA), _load(texts, j, k, columns, width, C, D, TMA)
            cosines = tl.dot(x, u.T, cosines)
        # Half a block at a time needs half the registers.
        left, right = tl.split(tl.permute(tl.reshape(cosines, (R, 2, C // 2)), (0, 2, 1)))
        more, sum_ = _finish(left, t, b, gradient, rows, columns, i, j, power, R, C // 2, EVEN, HARDWARE)
        loss, total = loss + more, total + sum_
        j += C // 2
        more, sum_ = _finish(right, t, b, gradient, rows, columns, i, j, power, R, C // 2, EVEN, HARDWARE)
        loss, total = loss + more, total + sum_
    tl.store(sums + tl.program_id(0), loss / LOG2E)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), total)


class _Blocks(NamedTuple):
    """Images, texts and width of a block; warps of a program, and loads in flight."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    tma: bool = False
    """Operands come by the bulk copy engine of Hopper."""
    persistent: bool = False
    """One program for each multiprocessor, which loads its next block's operands while it finishes this one."""
    registers: int | None = None
    band: int = 8


HOPPER = _Blocks(128, 256, 64, 8, 3, tma=True, persistent=True)
AMPERE = _Blocks(128, 128, 32, 8, 3)
INTERPRETED = _Blocks(32, 32, 32, 4, 1)


def blocks_for(device: torch.device) -> _Blocks | None:
    """The blocks for this card; None before Ampere (V100, T4), for whose tensor cores Triton makes no code."""
    return blocks_of(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else INTERPRETED


def blocks_of(major: int) -> _Blocks | None:
    """The same by the first digit of the card's compute capability."""
    return None if major < 8 else HOPPER if major == 9 else AMPERE


def sigmoid_tile(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, out: Tensor, power: float
) -> tuple[Tensor, Tensor]:
    """Writes ``power`` sigmoid(z) of the logits z = scale x images x texts^T + bias into ``out`` [r, c] and returns the
    sums of softplus(z) and of sigmoid(z), float64 [] each: every pair counts as a negative, and the caller corrects the
    matched ones.

    ``images`` [r, d], ``texts`` [c, d] and ``out``: contiguous float16, d a multiple of 8; ``scale`` [] and ``bias`` []
    float32.
    """
    (rows, width), columns = images.shape, texts.shape[0]
    block = blocks_for(out.device)
    assert block is not None and width % 8 == 0
    programs = triton.cdiv(rows, block.rows) * triton.cdiv(columns, block.columns)
    if block.persistent:
        programs = min(programs, torch.cuda.get_device_properties(out.device).multi_processor_count)
    sums = torch.empty(2, programs, dtype=torch.float32, device=out.device)
    _sigmoid_tile[(programs,)](
        TensorDescriptor.from_tensor(images, [block.rows, block.width]) if block.tma else images,
        TensorDescriptor.from_tensor(texts, [block.columns, block.width]) if block.tma else texts,
        scale,
        bias,
        out,
        sums,
        rows,
        columns,
        width,
        power,
        R=block.rows,
        C=block.columns,
        D=block.width,
        BAND=block.band,
        PERSISTENT=block.persistent,
        TMA=block.tma,
        EVEN=rows % block.rows == 0 and columns % block.columns == 0,
        HARDWARE=out.is_cuda,
        num_warps=block.warps,
        num_stages=block.stages,
        **({"maxnreg": block.registers} if block.registers else {}),
    )
    loss, total = sums.sum(1, dtype=torch.float64)
    return loss, total
