"""The losses under open_clip's names and signatures, for other training loops.

    loss = SigLipLoss()                                  # or ClipLoss(); any data-parallel wrapper
    loss(**model(images, texts)).backward()              # model returns image_features, text_features, logit_scale, ...

Each rank's value is its own share: the mean over ranks is the loss of the global batch. The gradient of each rank's
embeddings is that of the SUM over ranks, so the averaging that DDP, FSDP2, Fabric, accelerate and the Hugging Face
Trainer do gives every parameter, scale and bias included, the exact gradient of the global loss. A wrapper that sums
gradients instead of averaging them would multiply it by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.core.types import Embeddings, UserError
from trainer.losses.base import PairLoss
from trainer.losses.sigmoid import SigmoidLoss
from trainer.losses.softmax import SoftmaxLoss
from trainer.losses.topology import Exchange

EXCHANGES: dict[str | None, Exchange] = {
    None: "ring",
    "ring": "ring",
    "shift": "ring",
    "reduce": "ring",
    "bidir": "bidirectional",
    "bidirectional": "bidirectional",
    "gather": "gather",
    "hierarchical": "hierarchical",
}
"""open_clip's dist_impl, or RingLIP's exchange -> RingLIP's exchange. All give the same numbers."""


class _DropIn(nn.Module):
    """The base of both: open_clip's call, on one of RingLIP's losses."""

    def __init__(self, loss: PairLoss, rank: int | None, world_size: int | None, accum_freq: int) -> None:
        super().__init__()
        if accum_freq < 1:
            raise UserError(f"accum_freq is {accum_freq}; it must be 1 (no accumulation) or more")
        self.loss, self.rank, self.world_size, self.accum_freq = loss, rank, world_size, accum_freq

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this rank's pairs against the global batch; all ranks call it together.

        Args:
            image_features, text_features: [rows, width] each, L2-normalised, any float dtype; rows may differ by rank.
            logit_scale: one element, the factor on cosines *after* the exponential.
            logit_bias: one element, added to the logits; None: 0.
            output_dict: return ``{"contrastive_loss": loss}``.

        Returns:
            Scalar float32 (float64 for float64 features). ``backward`` may run once on it.

        Raises:
            UserError: rank or world_size do not match the process group, or the ranks' features do not fit together.
            PeerLost: a peer died or hangs.
        """
        self._check_ranks()
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)  # autocast may give two
        scale = _divide_gradient(logit_scale, self.accum_freq)
        bias = torch.zeros_like(scale) if logit_bias is None else _divide_gradient(logit_bias, self.accum_freq)
        value: Tensor = self.loss(Embeddings(image_features.to(dtype), text_features.to(dtype), scale, bias))
        return {"contrastive_loss": value} if output_dict else value

    def _check_ranks(self) -> None:
        group = self.loss.group
        here = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
        for name, given, found in zip(("rank", "world_size"), (self.rank, self.world_size), here, strict=True):
            if given is not None and given != found:
                raise UserError(
                    f"{type(self).__name__}: {name} is {given}, but the process group says {found}; leave rank and "
                    f"world_size out to take the group's"
                )


class SigLipLoss(_DropIn):
    """SigLIP's sigmoid loss (arXiv 2303.15343) in the place of ``open_clip.loss.SigLipLoss``: exact over the global
    batch, in memory that does not grow with the number of ranks.

    Args:
        cache_labels: accepted and unused, as in open_clip.
        rank, world_size: checked against the process group; None takes the group's.
        dist_impl: open_clip's bidir, shift, reduce and gather, or an exchange of RingLIP's; the numbers are equal.
        accum_freq: open_clip's ``--accum-freq``. Its loop runs the loss that often a step and would count scale and
            bias as often; their gradients are divided by it. 1 everywhere else.
        options: keywords of trainer.losses.SigmoidLoss (``tile_rows``, ``comm_dtype``, ``group``, ``negatives``, ...).
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        accum_freq: int = 1,
        **options: Any,
    ) -> None:
        if dist_impl not in EXCHANGES:
            known = ", ".join(name for name in EXCHANGES if name)
            raise UserError(f"SigLipLoss: dist_impl {dist_impl!r} is not known; known: {known}")
        super().__init__(SigmoidLoss(exchange=EXCHANGES[dist_impl], **options), rank, world_size, accum_freq)
        self.dist_impl = dist_impl


class ClipLoss(_DropIn):
    """CLIP's softmax loss (arXiv 2103.00020, figure 3) in the place of ``open_clip.loss.ClipLoss``.

    Its gradients are always exact: what open_clip computes with ``gather_with_grad``, whatever is given here.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted and unused: they choose how open_clip gathers.
        rank, world_size: checked against the process group; None takes the group's.
        use_horovod: not supported; True raises UserError.
        accum_freq: as in SigLipLoss.
        options: keywords of trainer.losses.SoftmaxLoss (``exchange``, ``tile_rows``, ``label_smoothing``, ...).
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
        *,
        accum_freq: int = 1,
        **options: Any,
    ) -> None:
        if use_horovod:
            raise UserError("ClipLoss: use_horovod is not supported; torch.distributed carries the exchange")
        super().__init__(SoftmaxLoss(**options), rank, world_size, accum_freq)


def _divide_gradient(value: Tensor, times: int) -> Tensor:
    """``value``, bit for bit, with its gradient divided by ``times``."""
    return value if times == 1 else value.detach() + (value - value.detach()) / times
