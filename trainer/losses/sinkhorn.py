"""Softmax towards targets balanced by optimal transport: OTTER (arXiv 2112.09445), a form of self-distillation.

    loss: {name: sinkhorn, mix: 0.5, temperature: 0.05, num_iterations: 3}

Web captions fit several images. The targets are (1 - mix) identity + mix Q, where Q is the entropic transport plan
between all images and all texts of the global batch with uniform marginals, from exp(cosine / temperature) without
gradient (Sinkhorn, arXiv 1306.0895). Its potentials are made by 2 num_iterations sweeps of streamed log-sum-exps (a
third of the full cost each), so memory stays flat:

    f_i = -LSE_j(c_ij + g_j),  g_j = -LSE_i(c_ij + f_i),  c = cosine / temperature

Q's rows are normalised exactly for the images' softmax (with the g before the last), its columns for the texts'.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.losses.base import PairLoss, PairSettings
from trainer.losses.softmax import exp_minus, log_sum_exps
from trainer.losses.tiles import Pairs, Tile


class SinkhornSettings(PairSettings):
    """Softmax towards targets balanced by optimal transport (OTTER)."""

    name: Literal["sinkhorn"] = "sinkhorn"
    mix: float = Field(default=0.5, ge=0, le=1)
    """Share of the transport plan in the targets; the rest is the pairing of the data."""
    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the transport plan; smaller is sharper."""
    num_iterations: int = Field(default=3, ge=1)
    """Sinkhorn iterations; each costs two thirds of a plain softmax step."""


class SinkhornLoss(PairLoss):
    """Symmetric cross-entropy towards (1 - mix) identity + mix (transport plan), after OTTER (arXiv 2112.09445,
    equation 5)."""

    def __init__(
        self, *args: Any, mix: float = 0.5, temperature: float = 0.05, num_iterations: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mix, self.temperature, self.num_iterations = mix, temperature, num_iterations

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=pairs.image.device)
        rows, columns = log_sum_exps(pairs, lambda tile: None, [])
        plan_rows, before, plan_columns = self._potentials(pairs)

        def visit(tile: Tile) -> None:
            column_norm, column_before, column_plan = tile.riders
            by_column = pairs.space("by_column", tile.z).copy_(tile.z)
            target = self._cost(pairs, tile).add_(column_before)
            exp_minus(target, -plan_rows[tile.rows, None], self.mix)
            total.add_(self._half(tile, tile.z, target, rows[tile.rows, None]))
            target = self._cost(pairs, tile, by_column).add_(plan_rows[tile.rows, None])
            exp_minus(target, -column_plan[None, :], self.mix)
            total.add_(self._half(tile, by_column, target, column_norm[None, :]))
            tile.z.add_(by_column)

        pairs.sweep(visit, [columns, before, plan_columns], (), image_gradient, text_gradient, self.comm_gradient_dtype)
        return total

    def _half(self, tile: Tile, z: Tensor, target: Tensor, norm: Tensor) -> Tensor:
        """One direction's loss; turns logits ``z`` into its half of the gradient. ``target`` is the plan's part,
        already weighted."""
        tile.diagonal_of(target).add_(1 - self.mix)
        near = norm.to(z.dtype)
        # Targets sum to one over the normalised side: sum T (norm - z), free of the large parts of both.
        loss = (z.sub_(near) * target).sum(dtype=torch.float64) + (
            target.sum(1 if norm.shape[1] == 1 else 0) * (near - norm).view(-1)
        ).sum()
        correction = (near - norm).exp().to(z.dtype)
        z.exp_().mul_(correction).sub_(target).mul_(0.5)
        return loss / -2

    def _cost(self, pairs: Pairs, tile: Tile, z: Tensor | None = None) -> Tensor:
        """cosine / temperature, [r, c]."""
        z = tile.z if z is None else z
        return torch.sub(z, pairs.bias, out=pairs.space("values", z)).mul_(1 / (pairs.scale * self.temperature))

    def _potentials(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """f of this rank's images, the g of its texts that f was made with, and g after f; [b] float64 each."""
        f = g = before = torch.zeros(pairs.image.shape[0], dtype=torch.float64, device=pairs.image.device)

        def with_g(tile: Tile) -> None:
            tile.z.copy_(self._cost(pairs, tile)).add_(tile.riders[0])

        def with_f(tile: Tile) -> None:
            tile.z.copy_(self._cost(pairs, tile)).add_(f[tile.rows, None])

        for _ in range(self.num_iterations):
            before = g
            f = -log_sum_exps(pairs, with_g, [before], over_columns=False)[0]
            g = -log_sum_exps(pairs, with_f, [], over_rows=False)[1]
        return f, before, g
