"""The softmax loss of CLIP (InfoNCE, arXiv 2103.00020), exact over the global batch with the sigmoid loss's flat
memory.

    loss = 1/2B sum over images i of CE(z_i., i) + 1/2B sum over texts j of CE(z_.j, j),  z_ij = t <x_i, u_j> + b

Two sweeps: the first streams the log-sum-exp of every row (here) and column (travelling with its text), the second
makes gradients. Log-sum-exps are float64 vectors: a float32 of size 100 has an error that would already show in the
gradient.

    loss: {name: softmax, label_smoothing: 0.1}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.core.types import UserError
from trainer.losses.base import PairLoss, PairSettings, SameGroup, group_sizes, groups_of
from trainer.losses.exchange import Sums
from trainer.losses.tiles import Pairs, Tile


class SoftmaxBaseSettings(PairSettings):
    """Keys of all softmax losses."""

    normalises: ClassVar = True
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread evenly over all texts (images) of the global batch (arXiv 1512.00567)."""
    same_group: SameGroup | Literal["auto"] = "auto"
    """Pairs of one group (equal captions): negative as in CLIP, mask (left out), or positive
    (the k of a group share the target evenly, 1/k each). auto: positive where captions repeat within a batch (measured
    at the start), else negative."""


class SoftmaxSettings(SoftmaxBaseSettings):
    """CLIP's softmax loss (InfoNCE), both directions."""

    name: Literal["softmax"] = "softmax"


class SoftmaxLoss(PairLoss):
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3).

    ``same_group: positive`` shares the target evenly among all of a group (supervised contrastive, arXiv 2004.11362,
    its L_out); ``mask`` leaves them out (false-negative cancellation, arXiv 2011.11765).
    """

    def __init__(
        self, *args: Any, label_smoothing: float = 0.0, same_group: SameGroup = "negative", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if label_smoothing and same_group == "mask":
            raise UserError(
                "loss.label_smoothing and same_group=mask: a target on masked pairs is impossible; remove one"
            )
        self.label_smoothing, self.same_group = label_smoothing, same_group

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        riders = [groups_of(pairs, "same_group")] if self.same_group != "negative" else []
        smoothing = self.label_smoothing / pairs.ring.total_rows
        every_logit = torch.zeros((), dtype=torch.float64, device=pairs.image.device)
        positive = self.same_group == "positive"
        in_group = _vector(pairs, 0.0)
        group_size = group_sizes(pairs, riders[0]).double() if positive else in_group

        def note(tile: Tile) -> None:
            if smoothing:
                every_logit.add_(tile.z.sum())
            if positive:
                same = tile.same_group(groups_of(pairs, "same_group"))
                in_group[tile.rows] += pairs.space("values", tile.z).copy_(tile.z).masked_fill_(~same, 0.0).sum(1)
            self._leave_out(pairs, tile)

        rows, columns = log_sum_exps(pairs, note, riders)
        rows = self._with_more_columns(pairs, rows)
        if positive:
            mean_in_group = in_group / group_size
            total = ((rows + columns) / 2 - (1 - self.label_smoothing) * mean_in_group).sum()
            row_share, column_share = torch.ones_like(rows), torch.ones_like(columns)
        else:
            # softplus(LSE of the negatives - z_ii) and its sigmoid: no difference of nearly equal numbers, however
            # small the loss.
            matched = pairs.matched_logits()
            losses, row_share, column_share = self._weigh(
                pairs, (rows - matched, columns - matched), image_gradient or text_gradient
            )
            total = (losses + self.label_smoothing * matched).sum()
        total = total - smoothing * every_logit
        if image_gradient or text_gradient:
            target = (
                (1 - self.label_smoothing) / group_size
                if positive
                else self.label_smoothing - (row_share + column_share) / 2
            )
            self._more_gradient(pairs, rows, row_share, image_gradient)

            def visit(tile: Tile) -> None:
                self._leave_out(pairs, tile)
                self._gradient(pairs, tile, rows, row_share, target, smoothing)

            travelling = torch.stack([columns, column_share], 1)
            pairs.sweep(visit, [*riders, travelling], (), image_gradient, text_gradient, self.comm_gradient_dtype)
        return total

    def _weigh(self, pairs: Pairs, hinges: tuple[Tensor, Tensor], learns: bool) -> tuple[Tensor, Tensor, Tensor]:
        """From log sum over negatives of exp(z_ij - z_ii), by row and by column, [b] each: the loss of each pair, and
        the sum of its row's and of its column's gradients over negatives."""
        losses = torch.nn.functional.softplus(torch.stack(hinges), threshold=700).sum(0) / 2
        return losses, hinges[0].sigmoid(), hinges[1].sigmoid()

    def _leave_out(self, pairs: Pairs, tile: Tile) -> None:
        """Drops masked pairs from the tile, and matched ones where they are dealt with in float64."""
        if self.same_group == "mask":
            tile.z.masked_fill_(tile.same_group(groups_of(pairs, "same_group")), float("-inf"))
        if self.same_group != "positive":
            tile.diagonal().fill_(float("-inf"))

    def _gradient(
        self, pairs: Pairs, tile: Tile, rows: Tensor, share: Tensor, target: Tensor, smoothing: float
    ) -> None:
        """Turns the tile into (P_rows + P_columns) / 2 - targets; ``target`` is what matched pairs get, or each of a
        group."""
        by_row = pairs.space("by_row", tile.z).copy_(tile.z)
        exp_minus(by_row, rows[tile.rows, None], share[tile.rows, None] / 2)
        columns, column_share = tile.riders[-1].unbind(1)
        exp_minus(tile.z, columns[None, :], column_share[None, :] / 2).add_(by_row)
        if smoothing:
            tile.z.sub_(smoothing)
        if self.same_group == "positive":
            tile.z.sub_(tile.same_group(groups_of(pairs, "same_group")) * target[tile.rows, None].to(tile.z.dtype))
        else:
            first, last = tile.matched()
            tile.diagonal().add_(target[first:last])

    def _with_more_columns(self, pairs: Pairs, rows: Tensor) -> Tensor:
        """For subclasses: the rows' log-sum-exp with further columns."""
        return rows

    def _more_gradient(self, pairs: Pairs, rows: Tensor, share: Tensor, image_gradient: bool) -> None:
        """For subclasses: adds the further columns' gradient to ``pairs``."""


def log_sum_exps(
    pairs: Pairs, note: Callable[[Tile], None], riders: list[Tensor], over_rows: bool = True, over_columns: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of this rank's images over all texts and of its texts over all images, [b] float64 each, in one
    sweep.

    ``note`` sees each tile first and may change it. A direction that is not asked for comes back as -inf.
    """
    rows = _vector(pairs, float("-inf"))
    column_sums = Sums((), torch.float64, float("-inf"), merge)

    def visit(tile: Tile) -> None:
        note(tile)
        scratch = pairs.space("values", tile.z)
        if over_rows:
            merge(rows[tile.rows], lse(tile.z, 1, scratch))
        if over_columns:
            merge(tile.sums[0], lse(tile.z, 0, scratch))

    totals = pairs.sweep(visit, riders, [column_sums] if over_columns else [])
    return rows, totals[0] if over_columns else _vector(pairs, float("-inf"))


def lse(z: Tensor, over: int, scratch: Tensor) -> Tensor:
    """Log-sum-exp of a tile over one of its sides, float64; ``scratch`` is shaped as ``z``."""
    largest = z.amax(over, keepdim=True)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    # The logarithm in float64: the sum's relative error stays where it is, instead of growing with the size of the
    # logits.
    return torch.sub(z, shift, out=scratch).exp_().sum(over).double().log().add_(shift.squeeze(over))


def merge(mine: Tensor, other: Tensor) -> Tensor:
    """mine <- log(exp(mine) + exp(other))."""
    return torch.logaddexp(mine, other, out=mine)


def exp_minus(z: Tensor, log_norm: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """z <- factor exp(z - log_norm) in place; ``log_norm`` float64, its rounding to float32 made good by a factor."""
    near = log_norm.to(z.dtype)
    near = near.masked_fill(near == float("-inf"), 0.0)  # nothing to sum over: all of z is -inf too
    return z.sub_(near).exp_().mul_(((near - log_norm).clamp(max=1.0).exp() * factor).to(z.dtype))


def _vector(pairs: Pairs, value: float) -> Tensor:
    return torch.full((pairs.image.shape[0],), value, dtype=torch.float64, device=pairs.image.device)
