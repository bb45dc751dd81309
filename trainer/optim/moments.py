"""Formats of an optimizer's moments: 4, 2 or 1 byte an element, equal however ZeRO cuts a parameter.

    moment = make(piece, "bfloat16", signed=True, name="exp_avg")
    values = moment.read(0, 1024)                  # float32, or the bf16 memory itself
    moment.write(0, values, step)                  # step: fixes the random rounding

bfloat16 has steps of 0.4 to 0.8%: rounded to nearest, a second moment with decay 0.999 would hardly move. It is rounded
up or down at random instead, with the probability that makes the mean right; the random numbers are a hash of (name,
step, number of the element in its parameter), so ranks and ZeRO stages round alike and nothing has to be stored.

int8 follows Dettmers et al. (arXiv 2110.02861): blocks of 256 elements of the flattened parameter share the largest
magnitude, and the 8 bits choose from a table that is fine near it and reaches down to a millionth of it. Where a
partition cuts a block, each rank has a scale for its part: that part is then rounded on a finer grid, and nothing else
changes. A block's largest value is in the table, so that reading and writing again (a checkpoint) changes nothing.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.core.partitioned import BLOCK, Dense, Moment, Piece

Format = Literal["float32", "bfloat16", "int8"]
LEAST = 4096
"""Parameters with fewer elements than this keep float32 where int8 is asked for: they cost nothing, and norms and
biases are sensitive (as in bitsandbytes)."""


def make(piece: Piece, format: Format, name: str, signed: bool = True) -> Moment:
    """A moment of zeros for what this rank holds of a parameter; ``signed`` False: never below 0."""
    where = piece.master.device
    if format == "int8" and piece.numel >= LEAST:
        return Blockwise(piece, signed)
    if format == "bfloat16":
        return Stochastic(piece, name)
    return Dense(torch.zeros(piece.length, device=where))


def bytes_per_element(format: Format, numel: int) -> float:
    """What ``make`` takes of memory for an element of a parameter with so many."""
    if format == "int8" and numel >= LEAST:
        return 1 + 4 / BLOCK
    return 2.0 if format == "bfloat16" else 4.0


class Stochastic(Dense):
    """bfloat16, rounded stochastically where ``write`` gets a step."""

    def __init__(self, piece: Piece, name: str) -> None:
        super().__init__(torch.zeros(piece.length, dtype=torch.bfloat16, device=piece.master.device))
        self._start = piece.start
        self._seed = zlib.crc32(f"{piece.name}.{name}".encode())

    def write(self, first: int, values: Tensor, step: int | None = None) -> None:
        if step is not None:
            values = round_at_random(values, self._start + first, self._seed + 0x9E3779B9 * step)
        super().write(first, values)


def round_at_random(values: Tensor, first: int, key: int) -> Tensor:
    """float32 values rounded to what bfloat16 holds, up or down with the probability that keeps the mean. ``first`` is
    the number of the first one; the same (number, key) meets the same random number everywhere."""
    number = torch.arange(values.numel(), dtype=torch.int32, device=values.device).add_(_int32(first))
    noise = number.mul_(_int32(0x9E3779B1)).add_(_int32(key))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finaliser of MurmurHash3
        noise ^= (noise >> shift) & ((1 << (32 - shift)) - 1)
        noise *= _int32(factor)
    # A float's bits grow with its magnitude: adding below the bits that are kept carries into them just as often as it
    # should.
    return (noise.bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-0x10000)).view(torch.float32)


def _int32(number: int) -> int:
    """The int32 with the low 32 bits of ``number``."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


class Blockwise(Moment):
    """One byte an element and one float32 scale for each block of 256 elements of the parameter."""

    def __init__(self, piece: Piece, signed: bool) -> None:
        where = piece.master.device
        self._start, self._length, self._signed = piece.start, piece.length, signed
        self._codes = torch.zeros(piece.length, dtype=torch.uint8, device=where)
        self._scales = torch.zeros(self._block(piece.length + BLOCK - 1), device=where)

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def _block(self, position: int) -> int:
        """The block of a local element; the first may begin before this rank's part."""
        return (self._start % BLOCK + position) // BLOCK

    def _frame(self, first: int, end: int) -> tuple[slice, tuple[int, int]]:
        """The blocks of a stretch, and how many elements of them lie before it and after it."""
        before, after = (self._start + first) % BLOCK, -(self._start + end) % BLOCK
        assert first == 0 or not before, "a block is read and written as a whole"
        assert end == self._length or not after, "a block is read and written as a whole"
        return slice(self._block(first), self._block(end + after)), (before, after)

    def read(self, first: int, end: int) -> Tensor:
        blocks, margins = self._frame(first, end)
        values = F.pad(_table(self._signed, self._codes.device)[self._codes[first:end].int()], margins)
        values = values.view(-1, BLOCK) * self._scales[blocks, None]
        return values.view(-1)[margins[0] : margins[0] + end - first]

    def write(self, first: int, values: Tensor, step: int | None = None) -> None:
        end = first + values.numel()
        blocks, margins = self._frame(first, end)
        framed = F.pad(values, margins).view(-1, BLOCK)
        scales = framed.abs().amax(dim=1)
        self._scales[blocks] = scales
        upper = (framed / scales.clamp(min=1e-38)[:, None]).view(torch.int32).view(-1) >> 16
        codes = _codes(self._signed, values.device)[upper.bitwise_and_(0xFFFF)]
        self._codes[first:end] = codes[margins[0] : margins[0] + end - first]


@cache
def _table(signed: bool, where: torch.device) -> Tensor:
    """The 255 or 256 values that a byte stands for, ascending. Each power of ten below the largest has half as many as
    the one above.

    Second moments have no 0 in it: rounded to that, one would make the next step as large as its eps is small.
    """
    levels = 7 if signed else 8
    magnitudes = [
        torch.linspace(0.1, 1.0, 2**level + 1, dtype=torch.float64)[1:] * 10.0 ** (level + 1 - levels)
        for level in range(levels)
    ]
    positive = torch.cat(magnitudes)
    zero = torch.zeros(1, dtype=torch.float64) if signed else positive[:1] / 10
    values = torch.cat([-positive.flip(0), zero, positive]) if signed else torch.cat([zero, positive])
    return values.to(torch.float32).to(where)


@cache
def _codes(signed: bool, where: torch.device) -> Tensor:
    """By the upper 16 bits of a float32: the code of the value nearest to the middle of the floats that begin so. They
    are apart by less than half of the table's finest step, so that a value of the table, off by a float's rounding, has
    its own code. A search in the table takes ten times as long on a CPU."""
    middles = ((torch.arange(1 << 16) << 16) + 0x8000).to(torch.int32).view(torch.float32).nan_to_num()
    table = _table(signed, torch.device("cpu"))
    return torch.bucketize(middles, (table[1:] + table[:-1]) / 2).to(torch.uint8).to(where)
