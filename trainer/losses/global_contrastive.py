"""The global contrastive loss: every sample is contrasted with the whole data set, in batches of any size.

    L = 1/2n sum over samples i of log(eps + g1_i) + log(eps + g2_i)
    g1_i = mean over j != i of exp(z_ij - z_ii),   g2_i = mean over j != i of exp(z_ji - z_ii),   z_ij = t <x_i, u_j>

A batch gives unbiased estimates of g1 and g2, but not of their logarithms: this is why a softmax needs large batches.
SogCLR (Yuan et al., arXiv 2202.12387) therefore keeps a running mean u of g for each sample, u <- (1 - gamma) u + gamma
g, and takes the gradient of g / (eps + u). FastCLIP (Wei et al., arXiv 2407.01445) lowers gamma along half a cosine,
and learns the temperature tau = 1 / t with the robust loss tau (L + rho): its v3, RGCL-g.

    loss: {name: global}                                # FastCLIP-v1; with gamma_decay: 0 SogCLR
    loss: {name: global, temperature: learned}          # FastCLIP-v3

With gamma 1 nothing is remembered, and this is a softmax without the matched pair in its denominator. The sweeps are
those of softmax.py; the logarithms of u, two float32 for each sample, are in a SampleTable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from trainer.core.types import Embeddings, UserError
from trainer.losses.base import PairSettings, group_sizes, groups_of
from trainer.losses.sample_table import SampleTable
from trainer.losses.softmax import SoftmaxLoss
from trainer.losses.tiles import Pairs

SMALLEST = torch.finfo(torch.float32).tiny
"""Stored for a logarithm of 0, since a stored 0 means that the sample was never seen."""


class GlobalSettings(PairSettings):
    """Contrasts every sample with the whole data set by running means (SogCLR, FastCLIP); for small batches."""

    repeats: ClassVar = "mask"
    normalises: ClassVar = True
    name: Literal["global"] = "global"
    gamma: float = Field(default=0.2, gt=0, le=1)
    """Weight of the present batch in a sample's running mean, once it has been lowered from 1."""
    gamma_decay: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the weight falls from 1 to gamma, along a cosine; 0: gamma from the start."""
    temperature: Literal["fixed", "learned"] = "fixed"
    """fixed: as model.scale or the checkpoint says (SogCLR, FastCLIP-v1); model.scale=14 is CLIP's at the start.
    learned: with the robust loss (FastCLIP-v3), where rho decides: in short runs the scale rose to its ceiling at 6.5
    and fell to 4 at 1, and fixed did better."""
    rho: float = Field(default=6.5, ge=0)
    """With a learned temperature: the larger, the lower the temperature becomes. The paper uses 6.5 for 2.7 million
    pairs and 8.5 or more for larger sets."""
    eps: float = Field(default=1e-14, ge=0)
    """Added to the running means: samples that are already told apart by more than that count less."""
    same_group: Literal["negative", "mask", "auto"] = "auto"
    """Pairs of one group (equal captions): negative, or mask (left out). auto: mask where captions repeat within a
    batch (measured at the start), else negative."""


class GlobalLoss(SoftmaxLoss):
    """SogCLR and FastCLIP-v1 and v3; needs ``Embeddings.ids``, the number of each sample in the data.

    The running means change in calls that take gradients, in training mode, as a queue does; ``snapshot`` takes a step
    back.
    """

    def __init__(
        self,
        *args: Any,
        gamma: float = 0.2,
        gamma_decay: float = 0.5,
        temperature: Literal["fixed", "learned"] = "fixed",
        rho: float = 6.5,
        eps: float = 1e-14,
        same_group: Literal["negative", "mask"] = "negative",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, same_group=same_group, **kwargs)
        self.least_gamma, self.gamma_decay, self.temperature = gamma, gamma_decay, temperature
        self.rho, self.log_eps = rho, math.log(eps) if eps else -math.inf
        self.gamma = gamma if gamma_decay == 0 else 1.0
        self.table = SampleTable(2, self.group)

    def progress(self, samples_seen: int, total_samples: int) -> None:
        done = min(1.0, samples_seen / (total_samples * self.gamma_decay)) if self.gamma_decay else 1.0
        self.gamma = self.least_gamma + (1 - self.least_gamma) * (1 + math.cos(math.pi * done)) / 2

    def snapshot(self) -> Callable[[], None]:
        return self.table.snapshot()

    def evaluate(self, z: Embeddings, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
        if z.ids is None or z.ids.shape != z.image.shape[:1]:
            raise UserError("loss.name global: Embeddings.ids is needed, one int64 for each pair: its sample's number")
        value, gradients = super().evaluate(z, needs)
        if self.temperature == "fixed":
            if gradients[2] is not None:
                gradients[2].zero_()
            return value, gradients
        # tau (L + rho) with tau = 1 / t: d / dt = tau dL/dt - tau^2 (L + rho)
        tau = 1 / z.scale.detach().to(value.dtype).reshape(())
        value = tau * (value + self.rho)
        scaled = [None if gradient is None else gradient.mul_(tau) for gradient in gradients]
        if scaled[2] is not None:
            scaled[2].sub_((tau * value).to(scaled[2].dtype))
        return value, scaled

    def _weigh(self, pairs: Pairs, hinges: tuple[Tensor, Tensor], learns: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``hinges``: log of the sum over negatives of exp(z_ij - z_ii), by row and by column, [b] float64 each."""
        total = pairs.ring.total_rows
        negatives = torch.full_like(hinges[0], total - 1)
        if self.same_group == "mask":
            negatives = total - group_sizes(pairs, groups_of(pairs, "same_group")).double()
        log_g = torch.stack(hinges, 1) - negatives.clamp(min=1).log()[:, None]
        first = sum(pairs.ring.rows[: pairs.ring.rank])
        mine = slice(first, first + log_g.shape[0])
        assert pairs.ids is not None
        every_id = self._of_all_ranks(pairs, pairs.ids, mine)
        before = self.table.read(every_id)[mine].double()
        mixed = torch.logaddexp(before + _log(1 - self.gamma), log_g + math.log(self.gamma))
        log_u = torch.where(before == 0, log_g, mixed)
        if learns and self.training:
            stored = log_u.float()
            stored = torch.where(stored == 0, torch.full_like(stored, SMALLEST), stored)
            self.table.write(every_id, self._of_all_ranks(pairs, stored, mine))
        pairs.largest_gradient = max(pairs.largest_gradient, 1 / self.gamma)
        log_norm = torch.logaddexp(log_u, torch.full_like(log_u, self.log_eps))
        shares = (log_g - log_norm).exp().nan_to_num(0.0)  # no negatives: -inf - -inf
        return log_norm.sum(1) / 2, shares[:, 0], shares[:, 1]

    def _of_all_ranks(self, pairs: Pairs, values: Tensor, mine: slice) -> Tensor:
        """[B, ...] in rank order, on every rank: a few bytes for each pair."""
        everyone = values.new_zeros(pairs.ring.total_rows, *values.shape[1:])
        everyone[mine] = values
        if pairs.ring.world > 1:
            dist.all_reduce(everyone, group=self.group)
        return everyone


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
