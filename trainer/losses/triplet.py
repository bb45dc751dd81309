"""The hardest-negative triplet loss of VSE++ (arXiv 1707.05612), a baseline of retrieval before CLIP.

    loss = 1/B sum over i of [margin + max_j<>i s_ij - s_ii]+ + [margin + max_j<>i s_ji - s_ii]+,  s = cosine

    loss: {name: triplet, margin: 0.2}

The hardest negatives are those of the GLOBAL batch: a first sweep finds the largest cosine of every row and column, a
second sends the gradient to where it was reached (equal cosines each get it). Scale and bias play no part and get zero
gradients.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.losses.base import PairLoss, PairSettings, groups_of
from trainer.losses.exchange import Sums
from trainer.losses.tiles import Pairs, Tile


class TripletSettings(PairSettings):
    """VSE++'s triplet loss with the hardest negative of the global batch."""

    repeats: ClassVar = "mask"
    name: Literal["triplet"] = "triplet"
    margin: float = Field(default=0.2, ge=0)
    """By how much a matched cosine should exceed the hardest negative's."""
    same_group: Literal["negative", "mask", "auto"] = "auto"
    """Pairs of one group (equal captions): negatives, or left out. auto: left out where captions repeat within a batch
    (measured at the start)."""


class TripletLoss(PairLoss):
    """Max-of-hinges triplet loss (VSE++, arXiv 1707.05612, equation 6)."""

    uses_scale = False

    def __init__(
        self, *args: Any, margin: float = 0.2, same_group: Literal["negative", "mask"] = "negative", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.margin, self.same_group = margin, same_group

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        riders = [groups_of(pairs, "same_group")] if self.same_group == "mask" else []
        hardest = torch.full((pairs.image.shape[0],), float("-inf"), dtype=pairs.dtype, device=pairs.image.device)
        matched = torch.zeros_like(hardest)

        def survey(tile: Tile) -> None:
            first, last = tile.matched()
            matched[first:last] = tile.diagonal()
            self._leave_out(pairs, tile)
            torch.maximum(hardest[tile.rows], tile.z.amax(1), out=hardest[tile.rows])
            torch.maximum(tile.sums[0], tile.z.amax(0), out=tile.sums[0])

        largest = Sums((), pairs.dtype, float("-inf"), lambda mine, other: torch.maximum(mine, other, out=mine))
        (hardest_images,) = pairs.sweep(survey, riders, [largest])
        by_image, by_text = (self.margin + worst - matched for worst in (hardest, hardest_images))
        if image_gradient or text_gradient:
            # A hinge that is not reached: no cosine is equal to infinity.
            pull = (by_image > 0).to(pairs.dtype) + (by_text > 0).to(pairs.dtype)
            target_rows, target_columns = (
                worst.masked_fill(hinge <= 0, float("inf"))
                for worst, hinge in ((hardest, by_image), (hardest_images, by_text))
            )

            def visit(tile: Tile) -> None:
                self._leave_out(pairs, tile)
                by_row = tile.z == target_rows[tile.rows, None]
                tile.z.copy_(tile.z == tile.riders[-1]).add_(by_row)
                first, last = tile.matched()
                tile.diagonal().sub_(pull[first:last])

            pairs.sweep(visit, [*riders, target_columns], (), image_gradient, text_gradient, self.comm_gradient_dtype)
        return by_image.clamp(min=0).sum(dtype=torch.float64) + by_text.clamp(min=0).sum(dtype=torch.float64)

    def _leave_out(self, pairs: Pairs, tile: Tile) -> None:
        if self.same_group == "mask":
            tile.z.masked_fill_(tile.same_group(groups_of(pairs, "same_group")), float("-inf"))
        tile.diagonal().fill_(float("-inf"))
