"""Adafactor, LAMB and Muon: the update of an element depends on its whole tensor, which ZeRO may have partitioned.

Adafactor needs the sums of a matrix's rows and columns, LAMB two norms of a tensor: each rank sums what it has, and one
small all-reduce a group does the rest. Muon needs the matrix itself: the ranks assemble it in bf16, a bucket at a time,
and share the work. Moments are cut as ZeRO cuts the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.core.distributed import device, rank, world_size
from trainer.core.partitioned import Dense, Moment, PartitionedOptimizer, Piece
from trainer.optim.elementwise import FormattedOptimizer, adam_moments, adamw, advance, most
from trainer.optim.moments import make

LEAST_SIDE = 32
"""Adafactor keeps whole second moments of matrices with a side below this, of vectors and of convolutions, as
big_vision does (its ``min_dim_size_to_factor``)."""
BUCKET_BYTES = 64 << 20
"""Matrices that Muon assembles at once, in bf16; a larger one alone."""


class Block(NamedTuple):
    """A rectangle of a matrix that lies in one stretch of its flattened elements."""

    first: int
    """Its first local element."""
    row: int
    column: int
    height: int
    width: int

    def of(self, flat: Tensor) -> Tensor:
        """[height, width] of a tensor of the local elements."""
        return flat[self.first : self.first + self.height * self.width].view(self.height, self.width)


def blocks(piece: Piece, most: int) -> Iterator[Block]:
    """The local part of a matrix as rectangles of whole rows, about ``most`` elements each, and at its ends parts of
    rows."""
    _, columns = piece.shape
    first = 0
    while first < piece.length:
        row, column = divmod(piece.start + first, columns)
        left = piece.length - first
        if column or left < columns:
            block = Block(first, row, column, 1, min(columns - column, left))
        else:
            block = Block(first, row, 0, min(left // columns, max(1, most // columns)), columns)
        yield block
        first += block.height * block.width


def is_factored(shape: tuple[int, ...]) -> bool:
    """Whether Adafactor keeps row and column means of a parameter's squared gradients instead of one for each."""
    return len(shape) == 2 and min(shape) >= LEAST_SIDE


class Adafactor(FormattedOptimizer):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) as big_vision trains SigLIP with it: second moments of matrices
    as means of rows and columns, their decay 1 - step^-0.8 up to a cap, no update clipping, no relative rate; first
    moments of the *updates*, not corrected for having started at 0, in bf16."""

    def moments(self, piece: Piece) -> dict[str, Moment]:
        found = {"exp_avg": make(piece, self._format, "exp_avg")}
        if not is_factored(piece.shape):
            return found | {"exp_avg_sq": make(piece, "float32", "exp_avg_sq", signed=False)}
        where = piece.master.device
        sides = zip(("exp_avg_sq_row", "exp_avg_sq_col"), piece.shape, strict=True)
        return found | {name: Dense(torch.zeros(side, device=where), (side,)) for name, side in sides}

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        (_, cap), eps = group["betas"], group["eps"]
        factored = [piece for piece in pieces if is_factored(piece.shape)]
        sums = self._sums(factored)
        for piece, (row, column) in zip(factored, sums, strict=True):
            state = self.state[piece.parameter]
            beta = min(cap, 1 - state["step"] ** -0.8)
            rows, columns = state["exp_avg_sq_row"].values, state["exp_avg_sq_col"].values
            rows.lerp_(row.div_(columns.numel()).add_(eps), 1 - beta)
            columns.lerp_(column.div_(rows.numel()).add_(eps), 1 - beta)
            by_row, by_column = (rows / rows.mean()).rsqrt_(), columns.rsqrt()
            gradient = piece.gradient
            for block in blocks(piece, most(gradient)):
                above = by_row[block.row : block.row + block.height, None]
                beside = by_column[block.column : block.column + block.width]
                self._move(piece, state, group, block.first, (block.of(gradient) * above * beside).view(-1))
        for piece in pieces:
            if is_factored(piece.shape):
                continue
            state, gradient = self.state[piece.parameter], piece.gradient
            beta = min(cap, 1 - state["step"] ** -0.8)
            state["exp_avg_sq"].values.lerp_(gradient.square().add_(eps), 1 - beta)
            self._move(piece, state, group, 0, gradient * state["exp_avg_sq"].values.rsqrt())

    def _sums(self, pieces: list[Piece]) -> list[tuple[Tensor, ...]]:
        """Sums of squared gradients over each row and each column of the whole matrices."""
        sides = [side for piece in pieces for side in piece.shape]
        if not sides:
            return []
        partial = torch.zeros(sum(sides), device=pieces[0].master.device)
        parts = partial.split(sides)
        for number, piece in enumerate(pieces):
            rows, columns = parts[2 * number : 2 * number + 2]
            gradient = piece.gradient
            for block in blocks(piece, most(gradient)):
                square = block.of(gradient).square()
                rows[block.row : block.row + block.height] += square.sum(dim=1)
                columns[block.column : block.column + block.width] += square.sum(dim=0)
        whole = self.sum_over_ranks(partial).split(sides)
        return list(zip(whole[::2], whole[1::2], strict=True))

    def _move(self, piece: Piece, state: dict[str, Any], group: dict[str, Any], first: int, update: Tensor) -> None:
        end, rate = first + update.numel(), group["lr"]
        m = state["exp_avg"].read(first, end).float().lerp(update, 1 - group["betas"][0])
        state["exp_avg"].write(first, m, state["step"])
        piece.weight[first:end].mul_(1 - rate * group["weight_decay"]).sub_(m, alpha=rate)


class Lamb(FormattedOptimizer):
    """AdamW whose update of a tensor is scaled to the tensor's own norm (You et al., arXiv 1904.00962). Vectors
    (norms, biases, scale) move as under AdamW: their norm says nothing of how far they may go."""

    def moments(self, piece: Piece) -> dict[str, Moment]:
        return adam_moments(piece, self._format)

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        squares = torch.zeros(len(pieces), 2, device=pieces[0].master.device)
        for piece, found in zip(pieces, squares, strict=True):
            state, gradient = self.state[piece.parameter], piece.gradient
            for first, end in piece.stretches(most(gradient)):
                advance(state, gradient[first:end], first, group["betas"])
                if len(piece.shape) > 1:
                    both = piece.weight[first:end], _lamb_update(piece, state, group, first, end)
                    found += torch.stack([part.square().sum() for part in both])
        norms = self.sum_over_ranks(squares).sqrt()
        ratios = torch.where(norms.prod(dim=1) > 0, norms[:, 0] / norms[:, 1], 1.0)
        for piece, ratio in zip(pieces, ratios, strict=True):
            for first, end in piece.stretches(most(piece.master)):
                update = _lamb_update(piece, self.state[piece.parameter], group, first, end)
                piece.weight[first:end].sub_(update.mul_(group["lr"] * ratio))


def _lamb_update(piece: Piece, state: dict[str, Any], group: dict[str, Any], first: int, end: int) -> Tensor:
    """Computed from the stored (rounded) moments, so that both calls return the same."""
    (beta1, beta2), step = group["betas"], state["step"]
    m, v = (state[kind].read(first, end).float() for kind in ("exp_avg", "exp_avg_sq"))
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt_().add_(group["eps"]))
    return update.add_(piece.weight[first:end], alpha=group["weight_decay"])


class Muon(PartitionedOptimizer):
    """Momentum whose matrices are made orthogonal (Jordan, https://kellerjordan.github.io/posts/muon) at the rate and
    weight decay of AdamW (Moonlight, arXiv 2502.16982), and AdamW for all other parameters. On one rank it is
    ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` bit for bit."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        groups: Iterable[dict[str, Any]],
        *,
        matrices: set[str],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(named, groups, defaults)
        self._matrices = matrices
        self._turn = 0
        """Which rank makes the next matrix orthogonal."""

    def moments(self, piece: Piece) -> dict[str, Moment]:
        if piece.name in self._matrices:
            return {"exp_avg": make(piece, "float32", "exp_avg")}
        return adam_moments(piece, "float32")

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        matrices = [piece for piece in pieces if piece.name in self._matrices]
        for piece in pieces:
            if piece.name not in self._matrices:
                adamw(piece, self.state[piece.parameter], group)
        bucket: list[Piece] = []
        for piece in matrices:
            if bucket and 2 * sum(p.numel for p in [*bucket, piece]) > BUCKET_BYTES:
                self._move(bucket, group)
                bucket = []
            bucket.append(piece)
        if bucket:
            self._move(bucket, group)

    def _move(self, bucket: list[Piece], group: dict[str, Any]) -> None:
        sizes = [piece.numel for piece in bucket]
        wanted = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=device())
        for piece, part in zip(bucket, wanted.split(sizes), strict=True):
            part[piece.start : piece.start + piece.length] = self._momentum(piece, group["momentum"])
        wanted = self.sum_over_ranks(wanted)  # all but one addend are 0: nothing is rounded
        found = torch.zeros_like(wanted)
        for piece, old, new in zip(bucket, wanted.split(sizes), found.split(sizes), strict=True):
            self._turn = (self._turn + 1) % world_size()
            if not self.partitioned or self._turn == rank():
                new.view(piece.shape).copy_(orthogonal(old.view(piece.shape)))
        found = self.sum_over_ranks(found)
        rate = group["lr"]
        for piece, part in zip(bucket, found.split(sizes), strict=True):
            update = part[piece.start : piece.start + piece.length].to(piece.master.device)
            weight = piece.weight.mul_(1 - rate * group["weight_decay"])
            weight.add_(update, alpha=-rate * (0.2 * max(piece.shape) ** 0.5))

    def _momentum(self, piece: Piece, momentum: float) -> Tensor:
        """Nesterov's, of this rank's elements."""
        gradient = piece.gradient
        kept = self.state[piece.parameter]["exp_avg"].values
        kept.lerp_(gradient, 1 - momentum)
        return gradient.lerp(kept, momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: five Newton-Schulz iterations in bf16, singular values end between
    0.5 and 1.5. ``torch.optim.Muon`` has the same function, under a private name."""
    x = matrix.clone() if matrix.size(0) <= matrix.size(1) else matrix.T.clone()
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrix.size(0) <= matrix.size(1) else x.T
