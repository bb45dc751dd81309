"""Distillation: the student's softmaxes over the global batch are trained to match a teacher's, with the flat memory of
the main loss.

    loss = 1/2B sum over images i of KL(Q_i. || P_i.) + 1/2B sum over texts j of KL(Q_.j || P_.j)

P are softmaxes of the student's logits t <x_i, u_j> + b over all texts (of an image) or all images (of a text), Q those
of the teacher's, which has its own width and temperature. It is the contrastive relational distillation of CLIP-KD
(arXiv 2307.12732, section 3.2.4) and, but for the teacher's entropy (a constant), the affinity mimicking of TinyCLIP
(arXiv 2309.12314, section 3.1), over the global batch.

Two sweeps, as in softmax.py: log-sum-exps of both models, then the loss and its gradients. The teacher's texts and the
texts' log-sum-exps are exchanged together with the student's texts. Biases cancel in a softmax, so the student's has a
gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.core.types import Embeddings, UserError
from trainer.losses.base import PairLoss, PairSettings
from trainer.losses.exchange import Sums
from trainer.losses.softmax import lse, merge
from trainer.losses.tiles import Pairs, Tile

STUDENT, TEACHER = 0, 1


class AffinityLoss(PairLoss):
    """KL divergence from the teacher's similarity distributions to the student's, both directions; needs
    ``Embeddings.teacher``."""

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        teacher = _teacher_of(pairs)
        texts = teacher.text.to(self.comm_dtype or teacher.text.dtype).contiguous()
        rows, columns = self._log_sum_exps(pairs, texts)
        total = torch.zeros((), dtype=torch.float64, device=pairs.image.device)

        def visit(tile: Tile) -> None:
            taught = _taught(pairs, tile)
            by_column = pairs.space("by_column", tile.z).copy_(tile.z)
            taught_by_column = pairs.space("taught_by_column", tile.z).copy_(taught)
            scratch = pairs.space("values", tile.z)
            total.add_(_half(tile.z, taught, rows[tile.rows, None, :], scratch))
            total.add_(_half(by_column, taught_by_column, tile.riders[1][None, :, :], scratch))
            tile.z.add_(by_column)

        pairs.sweep(visit, [texts, columns], (), image_gradient, text_gradient, self.comm_gradient_dtype)
        return total

    def _log_sum_exps(self, pairs: Pairs, texts: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 2] float64, student's and teacher's: of this rank's images over all texts, and of its texts over all
        images."""
        rows = torch.full((pairs.image.shape[0], 2), float("-inf"), dtype=torch.float64, device=pairs.image.device)

        def visit(tile: Tile) -> None:
            scratch = pairs.space("values", tile.z)
            for whose, z in ((STUDENT, tile.z), (TEACHER, _taught(pairs, tile))):
                merge(rows[tile.rows, whose], lse(z, 1, scratch))
                merge(tile.sums[0][:, whose], lse(z, 0, scratch))

        return rows, pairs.sweep(visit, [texts], [Sums((2,), torch.float64, float("-inf"), merge)])[0]


class TaughtLoss(nn.Module):
    """``main`` + ``weight`` x the mean over teachers of AffinityLoss (MobileCLIP, arXiv 2311.17049, equation 3): each
    exact over the global batch, and so is their sum.

    ``exchange`` are the recipe's loss settings: both traverse the global batch alike.
    """

    def __init__(self, main: PairLoss, weight: float, exchange: PairSettings) -> None:
        super().__init__()
        self.main, self.weight = main, weight
        self.affinity = AffinityLoss(**{key: getattr(exchange, key) for key in PairSettings.model_fields})

    def forward(self, z: Embeddings) -> Tensor:
        """As PairLoss; ``z.teacher`` has the teachers' embeddings of the same pairs."""
        teachers = z.teacher if isinstance(z.teacher, list) else [z.teacher]
        loss: Tensor = self.main(z._replace(teacher=None))
        for teacher in teachers:
            loss = loss + self.weight / len(teachers) * self.affinity(z._replace(teacher=teacher))
        return loss

    def progress(self, samples_seen: int, total_samples: int) -> None:
        """Updates schedules; called before each step."""
        self.main.progress(samples_seen, total_samples)

    def snapshot(self) -> Callable[[], None]:
        """As PairLoss."""
        return self.main.snapshot()

    def connect(self, device: torch.device) -> None:
        """As PairLoss; both go the same way."""
        self.main.connect(device)


def _teacher_of(pairs: Pairs) -> Embeddings:
    teacher = pairs.teacher
    if not isinstance(teacher, Embeddings):
        raise UserError("loss: distillation needs Embeddings.teacher, the teacher's embeddings of the same pairs")
    if teacher.image.shape != teacher.text.shape or teacher.image.shape[0] != pairs.image.shape[0]:
        shapes = f"{list(teacher.image.shape)} images and {list(teacher.text.shape)} texts"
        raise UserError(f"loss: the teacher's {shapes} are not those of {pairs.image.shape[0]} pairs")
    return teacher


def _taught(pairs: Pairs, tile: Tile) -> Tensor:
    """[r, c] the teacher's logits but for its bias, which no softmax sees; its texts are the first rider."""
    teacher, dtype = _teacher_of(pairs), tile.z.dtype
    z = torch.mm(teacher.image[tile.rows].to(dtype), tile.riders[0].to(dtype).t(), out=pairs.space("taught", tile.z))
    return z.mul_(teacher.scale.to(dtype))


def _half(z: Tensor, taught: Tensor, norms: Tensor, scratch: Tensor) -> Tensor:
    """Half of one direction's KL, float64 []; leaves half of its gradient (P - Q) in ``z`` and Q in ``taught``.

    ``norms`` [r, 1, 2] or [1, c, 2] float64 are both models' log-sum-exps; their rounding to float32 is made good, as a
    large logit's would show in the loss and the gradient.
    """
    near = norms.to(z.dtype)
    lost = near - norms
    z.sub_(near[..., STUDENT])
    taught.sub_(near[..., TEACHER])
    gap = torch.sub(taught, z, out=scratch)
    taught.exp_().mul_(lost[..., TEACHER].exp().to(z.dtype))
    mass = taught.sum(1 if norms.shape[1] == 1 else 0)
    value = (
        gap.mul_(taught).sum(dtype=torch.float64) + (mass * (lost[..., TEACHER] - lost[..., STUDENT]).view(-1)).sum()
    )
    z.exp_().mul_(lost[..., STUDENT].exp().to(z.dtype)).sub_(taught).mul_(0.5)
    return value / 2
