"""One training step: the exact gradient of the global batch, in the memory that the towers need for a micro-batch.

    result = train_step(engine, batch, loss, micro_batch=64, guard=guard)

Gradient caching (Gao et al., arXiv 2101.06983), made exact: pass 1 embeds the local batch in micro-batches without
gradient and records the random state of each; the loss runs ONCE on all embeddings; pass 2 restores the random states,
embeds again with gradient and backpropagates the inner product of embeddings and their gradients. Scale and bias count
once, towers without trainable parameters are skipped in pass 2, and a local batch of one micro-batch needs no second
pass.

The gradient does not depend on the micro-batch: if a step runs out of memory on any rank, all ranks repeat it with half
the micro-batch. Nor does it depend on fp16's loss scale: a step whose gradient overflows is repeated at half the scale.
trainer/gradient.py computes the gradient; this module repeats, checks and applies it.
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
from trainer.core.types import Batch, Embeddings, Loss, UserError
from trainer.engine.oom import REMEDY, free
from trainer.engine.rng import RandomState
from trainer.gradient import Attempt, Gradient, GradReduction, Teacher
from trainer.optim import Guard

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    from trainer.engine import Engine

Skipped = Literal["", "not finite", "spike"]


class BatchSettings(Settings):
    """Number of pairs per step, and of pairs at once."""

    renamed: ClassVar = {"reduce": "grad_reduction", "grad_reduction": {"once": "per_step", "each": "per_micro_batch"}}

    size: int = Field(gt=0)
    """Pairs in the global batch: each is contrasted with all others. It changes what is learned; the other keys do
    not."""
    micro_batch: Annotated[Annotated[int, Field(gt=0)] | Literal["auto"] | None, OPERATIONAL] = Field(None)
    """Pairs per rank that the towers process at once. null: the whole local batch, in a single pass. auto: the most
    that fits, according to the planner."""
    grad_reduction: Annotated[GradReduction, OPERATIONAL] = "auto"
    """per_step: average gradients once per step (least traffic, but every rank holds all gradients until then).
    per_micro_batch: average after every micro-batch (at ZeRO 2 and 3 a rank then holds only its shard). auto:
    per_micro_batch at ZeRO-3, and at ZeRO-2 on one GPU with an offloaded optimizer."""


@dataclass(frozen=True)
class StepResult:
    """The metrics of a step; the same on all ranks except ``local_seconds``."""

    loss: float
    """Of the global batch."""
    grad_norm: float
    """Of the global gradient, before clipping; inf if it was not finite, nan if the loss was not."""
    scale: float
    bias: float
    skipped: Skipped
    """Why the weights were not updated; empty if they were."""
    micro_batch: int
    """The micro-batch that was used: half of the requested one, or less, if memory did not suffice. Keep it for later
    steps."""
    local_seconds: float = dataclasses.field(default=0.0, compare=False)
    """Seconds that this rank took to embed its pairs, before it first waited for others (at ZeRO-3 earlier). Differs
    between ranks."""
    sample: Embeddings | None = dataclasses.field(default=None, compare=False, repr=False)
    """The first rows of this rank's embeddings, if asked for."""


def train_step(
    engine: Engine,
    batch: Batch,
    loss: Loss,
    micro_batch: int | None = None,
    *,
    grad_reduction: GradReduction = "auto",
    guard: Guard | None = None,
    teacher: Teacher | None = None,
    sample: int = 0,
) -> StepResult:
    """Updates the model once with this rank's ``batch`` (host or device memory; the same number of rows on all ranks).

    ``micro_batch`` rows go through the towers at a time, all if None. ``guard`` checks the gradient; without one only
    non-finite gradients are skipped. ``teacher(batch, rows)`` embeds the local batch for distillation. ``sample`` rows
    of the embeddings are returned. Raises UserError if not even one row at a time fits in memory.
    """
    assert batch.rows > 0, "an empty local batch"
    rows = min(micro_batch or batch.rows, batch.rows)
    start = RandomState.take(engine.device)
    restore_loss = _snapshot(loss)
    while True:
        attempt = Attempt(engine, batch, loss, rows, grad_reduction, teacher, sample)
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
    result = dataclasses.replace(
        _update(engine, gradient, guard, rows), local_seconds=attempt.clock.seconds(), sample=attempt.sample
    )
    if result.skipped == "not finite":
        restore_loss()
        if engine.loss_scale is not None and not gradient.overflowed:
            attempt.name_overflowing_modules()
    if engine.loss_scale is not None:
        engine.loss_scale.end_step(finite=math.isfinite(gradient.norm))
    return result


def _half(rows: int) -> int:
    """The next smaller micro-batch after an out-of-memory error."""
    if rows == 1:
        raise UserError(f"out of memory with one pair at a time: {REMEDY}")
    logger.info(f"out of memory with batch.micro_batch {rows}: repeating the step with {rows // 2}, and keeping that")
    return rows // 2


def _snapshot(loss: Loss) -> Callable[[], None]:
    """A function that restores the loss's present state (a queue of past embeddings) for a repeated step."""
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
