"""The gradient of one global batch by gradient caching: see trainer/step.py, which turns it into an update.

gradient = Attempt(engine, batch, loss, rows, grad_reduction, teacher).run()      # None: some rank ran out of memory
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trainer.core import collectives, distributed
from trainer.core.logs import EVERY_RANK
from trainer.core.types import Batch, Embeddings, Loss, UserError
from trainer.engine.oom import LOSS_REMEDY, OutOfMemory
from trainer.engine.rng import RandomState
from trainer.metrics import Stopwatch
from trainer.metrics.vitals import sample_of

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    from trainer.engine import Engine

GradReduction = Literal["auto", "per_step", "per_micro_batch"]
Teacher = Callable[[Batch, int], Embeddings | list[Embeddings]]


@dataclass(frozen=True)
class Gradient:
    """What is known of a gradient that the engine has."""

    loss: float
    norm: float
    scale: float
    bias: float

    @property
    def overflowed(self) -> bool:
        """Whether the loss is finite but the gradient is not: in fp16 the loss scale is then too large."""
        return math.isfinite(self.loss) and not math.isfinite(self.norm)


@dataclass(frozen=True)
class _Call:
    """A forward call of pass 1 and the random state before it, for pass 2 to repeat."""

    rows: slice
    image: bool
    text: bool
    random: RandomState


class Attempt:
    """An attempt at a gradient with a given micro-batch. ``run`` returns None if any rank ran out of memory."""

    def __init__(
        self,
        engine: Engine,
        batch: Batch,
        loss: Loss,
        rows: int,
        grad_reduction: GradReduction,
        teacher: Teacher | None,
        sample: int = 0,
    ) -> None:
        self.engine, self.batch, self.loss, self.rows, self.teacher = engine, batch, loss, rows, teacher
        self.reduces_early = grad_reduction == "per_micro_batch" or (grad_reduction == "auto" and engine.reduces_early)
        self.taught: Embeddings | list[Embeddings] | None = None
        self.trouble = OutOfMemory()
        self.clock = Stopwatch(engine.device)
        self.num_kept = sample
        self.sample: Embeddings | None = None
        """The first ``num_kept`` rows of this rank's embeddings."""

    def run(self) -> Gradient | None:
        if self.teacher is not None:  # first, while the student has not allocated anything
            with self.trouble.during("in the teacher"):
                self.taught = self.teacher(self.batch, self.rows)
            if self.trouble.anywhere():
                return None
        return self._single_pass() if self.rows >= self.batch.rows else self._two_passes()

    @torch.no_grad()
    def name_overflowing_modules(self) -> None:
        """Embeds the batch once more and warns of modules whose outputs overflow float16. Call it on all ranks."""
        with self.engine.find_overflow() as found:
            for start in range(0, self.batch.rows, self.rows):
                self._forward(slice(start, min(start + self.rows, self.batch.rows)), image=True, text=True)
        if found:
            names = ", ".join(dict.fromkeys(found))
            logger.warning(
                f"rank {distributed.rank()}: fp16 overflows in {names}: keep such layers in float32 with "
                "engine.float32_modules",
                extra=EVERY_RANK,
            )

    def _single_pass(self) -> Gradient | None:
        """Towers, loss and backward in one graph."""
        engine, trouble = self.engine, self.trouble
        z: Embeddings | None = None
        self.clock.start()
        with trouble.during("embedding", engine.forward_communicates):
            z = self._forward(slice(0, self.batch.rows), image=True, text=True)
        self.clock.stop()
        if trouble.anywhere() or z is None:
            return None
        value, mean = self._run_loss(z)
        if value is None:
            return None
        scale, bias = z.scale.item(), z.bias.item()
        if not math.isfinite(mean):
            return Gradient(mean, math.nan, scale, bias)
        self._keep(z)
        del z
        engine.start_gradients(each=self.reduces_early)
        with trouble.during("in the backward pass", engine.backward_communicates):
            engine.backward(value, last=True)
        del value
        return None if trouble.anywhere() else Gradient(mean, engine.finish_gradients(), scale, bias)

    def _two_passes(self) -> Gradient | None:
        embedded = self._embed(self._towers_trained())
        if embedded is None:
            return None
        leaves, calls = embedded
        value, mean = self._run_loss(leaves)
        if value is None:
            return None
        after = RandomState.take(self.engine.device)
        scale, bias = leaves.scale.item(), leaves.bias.item()
        if not math.isfinite(mean):
            return Gradient(mean, math.nan, scale, bias)
        self._keep(leaves)
        with self.trouble.during("in the backward pass of the loss"):
            value.backward()
        del value
        if self.trouble.anywhere():
            return None
        self.engine.start_gradients(each=self.reduces_early)
        with self.trouble.during("in the second pass", self.engine.backward_communicates):
            self._backpropagate(leaves, calls)
        if self.trouble.anywhere():
            return None
        after.restore(self.engine.device)
        return Gradient(mean, self.engine.finish_gradients(), scale, bias)

    def _forward(self, rows: slice, image: bool, text: bool) -> Embeddings:
        micro = Batch(*(field[rows] for field in self.batch)).to(self.engine.device)
        return self.engine.forward(
            micro.pixels if image else None, micro.tokens if text else None, micro.token_mask if text else None
        )

    def _towers_trained(self) -> tuple[bool, bool]:
        """Which embeddings depend on a trainable parameter; tested with one row, once per run."""
        if self.engine.towers_trained is None:
            before = RandomState.take(self.engine.device)
            with self.trouble.during("embedding one pair", self.engine.forward_communicates):
                z = self._forward(slice(0, 1), image=True, text=True)
                self.engine.towers_trained = z.image.requires_grad, z.text.requires_grad
            before.restore(self.engine.device)
        return self.engine.towers_trained or (True, True)

    @torch.no_grad()
    def _embed(self, trained: tuple[bool, bool]) -> tuple[Embeddings, list[_Call]] | None:
        """Pass 1: the embeddings of the whole local batch as leaves, and the calls that pass 2 must repeat."""
        image, text = trained
        # A tower that pass 2 skips is called separately, so that the random state of the other one can be restored.
        towers = [(True, True)] if image == text else [(True, False), (False, True)]
        calls: list[_Call] = []
        columns: list[Tensor | None] = [None, None]
        scale = bias = None
        self.clock.start()
        with self.trouble.during("in the first pass", self.engine.forward_communicates):
            state: RandomState | None = None
            for start in range(0, self.batch.rows, self.rows):
                rows = slice(start, min(start + self.rows, self.batch.rows))
                for call_image, call_text in towers:
                    state = RandomState.take(self.engine.device, state)
                    if (call_image and image) or (call_text and text):
                        calls.append(_Call(rows, call_image, call_text, state))
                    z = self._forward(rows, call_image, call_text)
                    scale, bias = z.scale, z.bias
                    for column, (part, wanted) in enumerate([(z.image, call_image), (z.text, call_text)]):
                        if wanted:
                            columns[column] = _place(part, columns[column], rows, self.batch.rows)
            if not calls:  # both towers are locked: only scale and bias are trained
                calls.append(_Call(slice(0, 0), False, False, RandomState.take(self.engine.device)))
        self.clock.stop()
        if self.trouble.anywhere():
            return None
        assert columns[0] is not None and columns[1] is not None and scale is not None and bias is not None
        leaves = [field.detach().clone().requires_grad_() for field in (scale, bias)]
        # A locked tower's gradient is not computed: it would cost a matrix product, and for texts a trip round the
        # ring.
        return Embeddings(
            columns[0].requires_grad_(image), columns[1].requires_grad_(text), leaves[0], leaves[1]
        ), calls

    def _run_loss(self, z: Embeddings) -> tuple[Tensor | None, float]:
        """The loss of the local batch, and its mean over ranks; None if any rank ran out of memory while activations of
        the towers were allocated."""
        value: Tensor | None = None
        taught, self.taught = self.taught, None
        with self.trouble.during("in the loss", communicates=distributed.world_size() > 1):
            groups, ids = (field.to(self.engine.device) for field in (self.batch.groups, self.batch.ids))
            value = self.loss(z._replace(groups=groups, ids=ids, teacher=taught))
        mine = 0.0 if value is None else value.item()
        mean, failed = collectives.mean_over_ranks([mine, float(self.trouble.here)])
        if failed and self.rows < self.batch.rows:  # no activations are allocated: a smaller micro-batch does not help
            raise UserError(
                f"out of memory in the loss, which needs the same memory with any batch.micro_batch: {LOSS_REMEDY}"
            )
        return (None, mean) if failed else (value, mean)

    def _keep(self, z: Embeddings) -> None:
        if self.num_kept:
            with self.trouble.during("keeping a sample of the embeddings"):
                self.sample = sample_of(z, self.num_kept)

    def _backpropagate(self, leaves: Embeddings, calls: list[_Call]) -> None:
        """Pass 2: embeds again with gradient; the inner product with the loss's gradient has the gradient of the
        loss."""
        # If every backward reduces, ZeRO expects the same parameters in each: scale and bias are divided into equal
        # parts.
        shares = len(calls) if self.reduces_early else 1
        for index, call in enumerate(calls):
            call.random.restore(self.engine.device)
            z = self._forward(call.rows, call.image, call.text)
            everything = slice(None)
            parts = [(z.image, leaves.image, call.rows, 1), (z.text, leaves.text, call.rows, 1)]
            if index < shares:
                parts += [(z.scale, leaves.scale, everything, shares), (z.bias, leaves.bias, everything, shares)]
            terms = [
                torch.sum(part * leaf.grad[rows]) / n
                for part, leaf, rows, n in parts
                if part.requires_grad and leaf.grad is not None
            ]
            self.engine.backward(torch.stack(terms).sum(), last=index == len(calls) - 1)


def _place(part: Tensor, whole: Tensor | None, rows: slice, num_rows: int) -> Tensor:
    """Writes a micro-batch's embeddings into the tensor of the local batch, to avoid a second copy."""
    if whole is None:
        whole = part.new_empty(num_rows, part.shape[1])
    whole[rows] = part
    return whole
