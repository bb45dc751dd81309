"""One training step: the exact gradient of the global batch, in as little memory as a micro-batch of the towers takes.

    result = train_step(engine, batch, loss, micro_batch=64, guard=guard)

Gradient caching (Gao et al., arXiv 2101.06983) with the details that make it exact: pass 1 embeds the local batch in
micro-batches without gradient and notes the random state of each; the loss runs ONCE on all embeddings; pass 2 draws
the same random numbers, embeds again with gradient and backpropagates the inner product of embeddings and their
gradients. Scale and bias count once, towers without a trainable parameter are left out of pass 2, and a local batch of
one micro-batch needs no second pass.

The gradient does not depend on the micro-batch: a step that runs out of memory on any rank is repeated with half of it
on all of them. Nor does it depend on fp16's loss scale: a step whose gradient overflows is repeated at half the scale.
trainer/gradient.py makes the gradient, this module repeats, judges and applies it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from trainer.core.settings import OPERATIONAL, Settings
from trainer.core.types import Batch, Loss, UserError
from trainer.engine.oom import REMEDY, free
from trainer.engine.rng import RandomState
from trainer.gradient import Attempt, Gradient, GradReduction, Teacher
from trainer.optim import Guard

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    from trainer.engine import Engine

Skipped = Literal["", "not finite", "spike"]


class BatchSettings(Settings):
    """How many pairs a step sees, and how many of them at once."""

    renamed: ClassVar = {"reduce": "grad_reduction", "grad_reduction": {"once": "per_step", "each": "per_micro_batch"}}

    size: int = Field(gt=0)
    """Pairs in the global batch: every one is contrasted with every other. It changes what is learnt; the other keys do
    not."""
    micro_batch: Annotated[Annotated[int, Field(gt=0)] | Literal["auto"] | None, OPERATIONAL] = Field(None)
    """Pairs per rank that the towers see at once. None: the whole local batch, in a single pass. auto: what the planner
    finds to fit."""
    grad_reduction: Annotated[GradReduction, OPERATIONAL] = "auto"
    """per_step averages gradients once a step (least traffic, but a rank holds all of them until then); per_micro_batch
    does after every micro-batch (at ZeRO 2 and 3 a rank then holds its shard alone); auto: per_micro_batch at ZeRO-3,
    and at ZeRO-2 on one GPU with an offloaded optimizer."""


@dataclass(frozen=True)
class StepResult:
    """What the log wants to know of a step; the same on all ranks except ``local_seconds``."""

    loss: float
    """Of the global batch."""
    grad_norm: float
    """Of the global gradient, before clipping; inf where it was not finite, nan where the loss was not."""
    scale: float
    bias: float
    skipped: Skipped
    """Why the weights were left as they are; empty when they were updated."""
    micro_batch: int
    """What it was done with: half of what was asked, or less, where memory did not suffice. Keep it for later steps."""
    local_seconds: float = dataclasses.field(default=0.0, compare=False)
    """Seconds that this rank took to embed its pairs, before it needed the others (at ZeRO-3 it does so earlier). Each
    rank has its own."""


def train_step(
    engine: Engine,
    batch: Batch,
    loss: Loss,
    micro_batch: int | None = None,
    *,
    grad_reduction: GradReduction = "auto",
    guard: Guard | None = None,
    teacher: Teacher | None = None,
) -> StepResult:
    """Updates the model once with this rank's ``batch`` (host or device memory; the same number of rows on all ranks).

    ``micro_batch`` rows go through the towers at a time, all of them when None. ``guard`` judges the gradient; without
    one only a gradient that is not finite is skipped. ``teacher``(batch, rows) embeds the local batch for a loss that
    distils. Raises UserError when not even one row at a time fits into memory.
    """
    assert batch.rows > 0, "an empty local batch"
    rows = min(micro_batch or batch.rows, batch.rows)
    start = RandomState.take(engine.device)
    restore_loss = _snapshot(loss)
    while True:
        attempt = Attempt(engine, batch, loss, rows, grad_reduction, teacher)
        gradient = attempt.run()
        if gradient is not None and not (gradient.overflowed and engine.lower_loss_scale()):
            break
        engine.discard_gradients()
        if gradient is None:
            del attempt
            free()
            rows = _half(rows)
        start.restore(engine.device)
        restore_loss()
    result = dataclasses.replace(_update(engine, gradient, guard, rows), local_seconds=attempt.clock.seconds())
    if result.skipped == "not finite":
        restore_loss()
        if engine.loss_scale is not None and not gradient.overflowed:
            attempt.name_overflowing_modules()
    if engine.loss_scale is not None:
        engine.loss_scale.end_step(finite=math.isfinite(gradient.norm))
    return result


def _half(rows: int) -> int:
    """The micro-batch to go on with after running out of memory."""
    if rows == 1:
        raise UserError(f"out of memory with one pair at a time: {REMEDY}")
    logger.info(
        f"out of memory with batch.micro_batch {rows}: the same step again with {rows // 2}, and so from now on"
    )
    return rows // 2


def _snapshot(loss: Loss) -> Callable[[], None]:
    """What brings the loss's state (a queue of past embeddings) back to what it is now: a repeated step must meet it
    unchanged."""
    snapshot: Callable[[], Callable[[], None]] | None = getattr(loss, "snapshot", None)
    return snapshot() if snapshot is not None else lambda: None


def _update(engine: Engine, gradient: Gradient, guard: Guard | None, rows: int) -> StepResult:
    norm = gradient.norm
    if guard is not None:
        limit = guard.limit
        verdict = guard.judge(norm)
    else:
        limit, verdict = None, "step" if math.isfinite(norm) else "skip"
    skipped: Skipped = ""
    if verdict == "skip":
        engine.discard_gradients()
        skipped = "spike" if math.isfinite(norm) else "not finite"
    else:
        engine.step(clip=limit if verdict == "clip" else None)
    return StepResult(gradient.loss, norm, gradient.scale, gradient.bias, skipped, rows)
