"""Training steps under DeepSpeed on the device: exact gradients, replayed random numbers, recovery from lack of
memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.gpu.checks import Check, Measured, Skip, on_gpu, worst
from tests.support.dense_step import (
    Case,
    GatheredSigmoid,
    Pieces,
    captured,
    global_batch,
    reference,
    relative_errors,
    seed_rank,
)
from trainer.core import distributed
from trainer.engine import Engine
from trainer.losses import SigmoidLoss
from trainer.step import train_step

FP32 = 2e-5
"""Of each parameter's gradient; the CPU's own tests ask for 5e-6 of the same tiny model."""
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Unit roundoff. A few layers round a gradient several times over."""
ROOM = 8

known_reference = cache(reference)


def in_memory(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.cpu() for name, gradient in gradients.items()}


def step(case: Case, piece: Pieces, precision: str) -> tuple[float, dict[str, Tensor]]:
    distributed.init(60)
    engine = case.engine(precision=precision)
    seed_rank(0)
    result = train_step(
        engine,
        global_batch(case.rows, 0),
        SigmoidLoss(),
        piece.micro_batch,
        grad_reduction=piece.grad_reduction,
    )
    assert not result.skipped, result.skipped
    return result.loss, in_memory(captured(engine))


def exact(case: Case, piece: Pieces) -> Measured:
    """fp32 against float64 on the CPU, parameter by parameter."""
    loss, found = step(case, piece, "fp32")
    wanted_loss, wanted = known_reference(case, 1, None, 0)
    return worst(relative_errors(found, wanted) | {"loss": abs(loss - wanted_loss) / abs(wanted_loss)}, FP32)


def rounded(case: Case, piece: Pieces, precision: str) -> Measured:
    """Half precision against float64, over all parameters together."""
    _, found = step(case, piece, precision)
    _, wanted = known_reference(case, 1, None, 0)
    error = sum(float((found[n].double() - w).norm()) ** 2 for n, w in wanted.items()) ** 0.5
    size = sum(float(w.norm()) ** 2 for w in wanted.values()) ** 0.5
    return Measured(f"{error / size:.2e}", error / size <= ROOM * ROUNDING[precision], {"value": error / size})


@contextmanager
def recorded(into: list[tuple[bool, Tensor, Tensor]]) -> Iterator[None]:
    """Notes (with gradient?, image, text) of every forward."""
    real = Engine.forward

    def forward(self: Engine, *inputs: Any) -> Any:
        z = real(self, *inputs)
        into.append((torch.is_grad_enabled(), z.image.detach().clone(), z.text.detach().clone()))
        return z

    with patch.object(Engine, "forward", forward):
        yield


def both_passes(precision: str, stage: int) -> Measured:
    """With dropout, pass 2 embeds what pass 1 embedded, bit for bit."""
    distributed.init(60)
    engine = Case(stage=stage, dropout=0.3).engine(precision=precision)
    seed_rank(0)
    train_step(engine, global_batch(16, 1), SigmoidLoss(), 4)
    seen: list[tuple[bool, Tensor, Tensor]] = []
    with recorded(seen):
        train_step(engine, global_batch(16, 0), SigmoidLoss(), 4)
    passes = [[z[1:] for z in seen if z[0] is gradient] for gradient in (False, True)]
    same = len(passes[0]) == len(passes[1]) == 4 and all(
        torch.equal(a, b) for first, second in zip(*passes, strict=True) for a, b in zip(first, second, strict=True)
    )
    return Measured("bit-equal" if same else "different", same)


class RealFault:
    """A layer that asks the device for a petabyte, once: a genuine out-of-memory error at a chosen place."""

    def __init__(self, layer: torch.nn.Module, where: str) -> None:
        self.where, self.left = where, 1
        layer.register_forward_hook(self)

    def __call__(self, layer: Any, inputs: Any, output: Any) -> None:
        if not self.left or torch.is_grad_enabled() == (self.where == "pass 1"):
            return
        if self.where == "backward":
            (output[0] if isinstance(output, tuple) else output).register_hook(self.fail)
        else:
            self.fail()

    def fail(self, *_: Any) -> None:
        if self.left:
            self.left = 0
            torch.empty(1 << 50, dtype=torch.uint8, device=distributed.device())


def recovers(stage: int, offload: str, where: str, grad_reduction: Any) -> Measured:
    """Out of memory in a step of micro-batches of 4: the gradient is that of micro-batches of 2 from the start."""
    if not on_gpu():
        raise Skip("tests/test_step_oom.py injects the error on the CPU")
    distributed.init(60)
    found = []
    for broken in (True, False):
        engine = Case(stage=stage, offload=offload, dropout=0.2).engine()
        seed_rank(0)
        train_step(engine, global_batch(16, 1), GatheredSigmoid(), 4)
        if broken:
            RealFault(engine.module.towers.vision_model.encoder.layers[0], where)
        result = train_step(
            engine, global_batch(16, 0), GatheredSigmoid(), 4 if broken else 2, grad_reduction=grad_reduction
        )
        found.append((result.micro_batch, in_memory(captured(engine))))
    (rows, mine), (_, wanted) = found
    same = rows == 2 and all(torch.equal(mine[name], wanted[name]) for name in wanted)
    return Measured(f"micro-batch {rows}, {'bit-equal' if same else 'different'}", same)


def checks(dry: bool) -> list[Check]:
    places = [(0, ""), (1, ""), (2, ""), (3, ""), (1, "optimizer"), (2, "optimizer"), (3, "optimizer")]
    places += [(3, "optimizer parameters")]
    if dry:
        places = [(1, ""), (3, "")]
    found = []
    for stage, offload in places:
        case = Case(stage=stage, offload=offload)
        title = f"ZeRO-{stage}{', offloaded ' + offload if offload else ''}"
        pieces = [Pieces(None), Pieces(4), *([Pieces(4, "per_micro_batch")] if stage >= 2 else [])]
        for piece in pieces:
            how = "one pass" if piece.micro_batch is None else f"two passes, {piece.grad_reduction}"
            found.append(Check(f"{title}, {how}", f"fp32 error <= {FP32:.0e}", partial(exact, case, piece)))
    for precision, roundoff in ROUNDING.items():
        criterion = f"error <= {ROOM * roundoff:.1e}"
        for stage in (1,) if dry else (0, 1, 2, 3):
            check = partial(rounded, Case(stage=stage), Pieces(4), precision)
            found.append(Check(f"{precision}, ZeRO-{stage}, two passes", criterion, check))
        found.append(Check(f"{precision}, LoRA", criterion, partial(rounded, Case(lora=True), Pieces(4), precision)))
    for precision in ("fp32", "bf16"):
        for stage in (1,) if dry else (1, 3):
            check = partial(both_passes, precision, stage)
            found.append(Check(f"dropout, {precision}, ZeRO-{stage}: pass 1 = pass 2", "bit-equal", check))
    for stage, offload in ((0, ""), (1, ""), (2, ""), (3, ""), (2, "optimizer")):
        for where in ("pass 1", "pass 2", "backward"):
            for reduction in ("per_step", "per_micro_batch") if stage >= 2 and where == "backward" else ("per_step",):
                title = f"out of memory in {where}, ZeRO-{stage}{' offloaded' if offload else ''}, {reduction}"
                check = partial(recovers, stage, offload, where, reduction)
                found.append(Check(title, "repeated with half, bit-equal", check))
    return found[: 12 if dry else None] + (found[-1:] if dry else [])
