"""The sigmoid loss of SigLIP (arXiv 2303.15343), exact over the global batch with flat memory.

loss = 1/B sum over images i and texts j of softplus(-y_ij (t <x_i, u_j> + b)),  y = +1 for matched pairs, else -1

loss: {name: sigmoid, tile_rows: 512, exchange: ring}
loss: {name: sigmoid, negatives: {keep: hardest, ratio: 16}}
loss: {name: sigmoid, same_group: positive}
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.losses.base import PairLoss, PairSettings, SameGroup, group_sizes, groups_of
from trainer.losses.negatives import Choice, NegativeSettings
from trainer.losses.tiles import Pairs, Tile

KERNELS = True
"""False uses the torch path on GPUs too."""
KERNEL_TILE_ROWS = 16384
"""Images per tile of the fused kernel: with a slice of 8,192 texts 256 MiB of float16 gradient."""


class _SigmoidBaseSettings(PairSettings):
    """The keys of the sigmoid loss."""

    name: str
    same_group: SameGroup | Literal["auto"] = "auto"
    """Pairs of one group (equal captions): negative as in SigLIP, mask (left out), or positive
    (the k texts of an image's group weigh 1/k each, so that the size of the loss does not depend on k). auto: positive
    if captions repeat within a batch (measured at the start), else negative."""
    negatives: NegativeSettings = NegativeSettings()
    """Which negatives are kept, and their weight."""

    @property
    def plain(self) -> bool:
        """Whether every pair counts, and as much as another: what the fused kernel computes."""
        return self.same_group in ("auto", "negative") and self.negatives == NegativeSettings()


class SigmoidSettings(_SigmoidBaseSettings):
    """SigLIP's sigmoid loss over every pair of the global batch."""

    name: Literal["sigmoid"] = "sigmoid"


class AutoSettings(_SigmoidBaseSettings):
    """The loss that the model was made for: sigmoid for one with a bias (SigLIP, a new tower pair), softmax for one
    without (CLIP)."""

    name: Literal["auto"] = "auto"


class SigmoidLoss(PairLoss):
    """Sigmoid loss (SigLIP, arXiv 2303.15343, equation 1; negatives kept at a ratio as in its figure 6).

    ``same_group`` masks false negatives by group (as in false-negative cancellation, arXiv 2011.11765) or takes them as
    further positives (several captions of one image): of k positives each weighs 1/k, so that all of an image's weigh 1
    and its negatives 1 each, as where nothing repeats. After a call ``scored_pairs`` holds how many pairs of this rank
    counted (int64 []).
    """

    def __init__(
        self, *args: Any, same_group: SameGroup = "negative", negatives: NegativeSettings | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.same_group, self.negatives = same_group, negatives or NegativeSettings()
        self.samples_seen, self.total_samples = 1, 1
        self.scored_pairs = torch.zeros((), dtype=torch.int64)

    def progress(self, samples_seen: int, total_samples: int) -> None:
        self.samples_seen, self.total_samples = samples_seen, total_samples

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=pairs.image.device)
        self.scored_pairs = torch.zeros((), dtype=torch.int64, device=pairs.image.device)
        gradients = image_gradient or text_gradient
        riders = [groups_of(pairs, "same_group")] if self.same_group != "negative" else []
        ratio = self.negatives.ratio_at(self.samples_seen, self.total_samples, pairs.ring.total_rows)
        plain = not riders and ratio is None and self.negatives.weight == 1
        choice = Choice(self.negatives, ratio, self.samples_seen, pairs)
        choice.decide(riders[0] if riders else None, riders)
        share = 1.0 / group_sizes(pairs, riders[0]).to(pairs.dtype) if self.same_group == "positive" else None

        def visit_all(tile: Tile) -> None:
            # softplus(-z) of matched pairs directly: softplus(z) - z would cancel where z is large.
            matched = tile.diagonal().neg_()
            total.add_(_sum_softplus_and_sigmoid_(pairs, tile))
            if gradients:
                matched.neg_()
                pairs.d_bias.add_(tile.z.sum(1).sum(dtype=torch.float64))

        def visit_some(tile: Tile) -> None:
            sign, weight = self._sign_and_weight(pairs, tile, choice, share)
            tile.z.mul_(sign)
            total.add_(_softplus(pairs, tile).mul_(weight).sum())
            self.scored_pairs.add_(torch.count_nonzero(weight))
            if gradients:
                tile.z.sigmoid_().mul_(weight).mul_(sign)
                pairs.d_bias.add_(tile.z.sum(1).sum(dtype=torch.float64))

        def visit_on_gpu(tile: Tile) -> None:
            assert kernel is not None
            loss, gradient = kernel(tile.images, tile.texts, pairs.scale, pairs.bias, tile.z, pairs.power)
            total.add_(loss)
            pairs.d_bias.add_(gradient)
            first, last = tile.matched()
            if first < last:
                # softplus(-z) = softplus(z) - z, and its gradient -sigmoid(-z) = sigmoid(z) - 1.
                z = pairs.matched_logits(first, last)
                tile.diagonal().copy_(z.neg().sigmoid_().mul_(-pairs.power))
                total.sub_(z.sum())
                pairs.d_bias.sub_(last - first)

        kernel = fused_kernel(pairs.image) if plain and pairs.fast else None
        if kernel and self.tile_rows is None:
            pairs.tile_rows = min(KERNEL_TILE_ROWS, pairs.image.shape[0])
        pairs.largest_gradient = max(pairs.largest_gradient, self.negatives.weight)
        visit = visit_on_gpu if kernel else visit_all if plain else visit_some
        pairs.sweep(
            visit, riders, (), image_gradient, text_gradient, self.comm_gradient_dtype, make_logits=kernel is None
        )
        if plain:
            self.scored_pairs.fill_(pairs.image.shape[0] * pairs.ring.total_rows)
        return total

    def _sign_and_weight(self, pairs: Pairs, tile: Tile, choice: Choice, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """[r, c] each: -1 on positives and +1 on negatives; what each pair counts. ``share`` [b] is what each positive
        of an image counts; None: the matched pair is the only one."""
        sign, weight = pairs.space("sign", tile.z).fill_(1), pairs.space("weight", tile.z).fill_(self.negatives.weight)
        kept = choice.mask(tile)
        if kept is not None:
            weight.mul_(kept)
        same = tile.same_group(groups_of(pairs, "same_group")) if self.same_group != "negative" else None
        if same is not None and share is not None:  # matched pairs are among them
            torch.where(same, share[tile.rows, None], weight, out=weight)
            return sign.masked_fill_(same, -1.0), weight
        if same is not None:
            weight.masked_fill_(same, 0.0)
        tile.diagonal_of(sign).fill_(-1.0)
        tile.diagonal_of(weight).fill_(1.0)
        return sign, weight


def _softplus(pairs: Pairs, tile: Tile) -> Tensor:
    # The out= form of F.softplus: no new tensor for each tile.
    values: Tensor = torch.ops.aten.softplus.out(tile.z, 1.0, 20.0, out=pairs.space("values", tile.z))
    return values


def _sum_softplus_and_sigmoid_(pairs: Pairs, tile: Tile) -> Tensor:
    """Sum of softplus(z), while z <- sigmoid(z): half the time of the two apart.

    softplus(z) = max(z, 0) - log(1 - u) with u = min(s, 1 - s), s = sigmoid(z); four terms share a logarithm by
    (1 - u)(1 - v) = 1 - (u + v - uv), which keeps the digits of small u.
    """
    values = pairs.space("values", tile.z)
    if tile.z.numel() % 4:
        total = torch.ops.aten.softplus.out(tile.z, 1.0, 20.0, out=values).sum()
        tile.z.sigmoid_()
        return total
    positive = torch.clamp(tile.z, min=0, out=values).sum()
    tile.z.sigmoid_()
    torch.sub(1, tile.z, out=values)
    u = torch.minimum(values, tile.z, out=values).view(-1)
    for _ in range(2):
        u, v = u.chunk(2)
        u.add_(torch.addcmul(v, u, v, value=-1, out=v))
    return positive - u.neg_().log1p_().sum()


def fused_kernel(image: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The Triton kernel where there is one for ``image`` [b, d] float16, else None: then torch's own operations do."""
    if not (KERNELS and image.is_cuda and image.shape[1] % 8 == 0 and importlib.util.find_spec("triton")):
        return None
    from trainer.losses.kernel import blocks_for, sigmoid_tile

    return sigmoid_tile if blocks_for(image.device) else None
