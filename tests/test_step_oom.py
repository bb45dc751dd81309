"""Out of memory on one rank: all ranks repeat the very same step with half the micro-batch. And what a step holds at
its peak."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.dense_step import (
    Case,
    GatheredSigmoid,
    captured,
    global_batch,
    local_slice,
    relative_errors,
    seed_rank,
)
from tests.support.forked_ranks import run_ranks
from tests.support.tensor_memory import TensorMemory
from tests.support.tiny_models import tiny_batch, tiny_model
from trainer.core import distributed
from trainer.core.types import Embeddings, UserError
from trainer.engine import EngineSettings, build_engine
from trainer.losses import SigmoidLoss
from trainer.losses.tiles import Pairs
from trainer.models.adapt.lock import LockSettings
from trainer.optim import AdamWSettings, build_optimizer
from trainer.step import train_step

ROWS = 16


def is_last() -> bool:
    """Whether this is the rank that runs out of memory."""
    return distributed.rank() == distributed.world_size() - 1


class CountingLoss(SigmoidLoss):
    """Holds state as a queue of past embeddings does, and can run out of memory on the last rank in the midst of the
    exchange."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(tile_rows=3)
        self.register_buffer("calls", torch.zeros(1))
        self.failures = 0

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        self.calls += 1
        if self.failures and is_last():
            self.failures -= 1
            real, seen = pairs._against, iter(range(100))

            def fails_once(*arguments: Any) -> None:
                if next(seen) == 2:
                    raise torch.OutOfMemoryError("injected")
                real(*arguments)

            pairs._against = fails_once  # type: ignore[method-assign]
        return super().objective(pairs, image_gradient, text_gradient)


class Fault:
    """Makes the last rank run out of memory inside a layer: in its ``call``-th forward pass without or with gradient,
    or in the backward pass."""

    def __init__(self, layer: nn.Module, where: str, call: int = 2, times: int = 1) -> None:
        self.where, self.call, self.left, self.seen = where, call, times, 0
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if not is_last() or not self.left or torch.is_grad_enabled() == (self.where == "first pass"):
            return
        self.seen += 1
        if self.seen < self.call:
            return
        self.seen = 0
        if self.where == "backward":
            (output[0] if isinstance(output, tuple) else output).register_hook(self.fail)
        else:
            self.fail()

    def fail(self, *_: Any) -> None:
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("injected")


def interrupted(
    stage: int, offload: str, where: str, micro_batch: int | None, grad_reduction: Any, times: int, layer: str
) -> list[dict[str, Any]]:
    """A step that is interrupted and one that had the smaller micro-batch from the start, each after an ordinary
    step."""
    found = []
    for broken in (True, False):
        engine, loss = Case(stage=stage, offload=offload, dropout=0.2).engine(), CountingLoss()
        seed_rank(distributed.rank())
        train_step(engine, local_slice(global_batch(ROWS, 1)), loss, 4)
        rows = micro_batch
        if broken:
            loss.failures = times if where == "loss" else 0
            Fault(
                engine.module.towers.get_submodule(layer),
                where,
                2 if micro_batch else 1,
                times if where != "loss" else 0,
            )
        else:
            rows = (micro_batch or 8) // 2**times
        result = train_step(engine, local_slice(global_batch(ROWS, 2)), loss, rows, grad_reduction=grad_reduction)
        found.append({
            "result": result,
            "gradients": captured(engine),
            "calls": loss.calls.item(),
            "next number": torch.rand(1).item(),
            "next loss": train_step(engine, local_slice(global_batch(ROWS, 3)), loss, result.micro_batch).loss,
        })  # fmt: skip
    return found


FIRST = "vision_model.encoder.layers.0"
"""Its backward pass comes when most gradients have been reduced."""
CASES = [
    (0, "", "first pass", 4, "per_step", 1),
    (0, "", "second pass", 4, "per_step", 1),
    (0, "", "backward", 4, "per_step", 1),
    (1, "", "first pass", 4, "per_step", 1),
    (1, "", "backward", 4, "per_step", 1),
    (1, "", "loss", None, "per_step", 1),
    (2, "", "second pass", 4, "per_step", 1),
    (3, "", "loss", None, "per_micro_batch", 1),
    (1, "", "second pass", None, "per_step", 2),  # a single pass becomes two passes
    (2, "", "backward", None, "per_step", 1),
    (2, "optimizer", "backward", 4, "per_step", 2),
    (2, "optimizer", "first pass", 4, "per_micro_batch", 1),
]


@pytest.mark.parametrize(("stage", "offload", "where", "micro_batch", "grad_reduction", "times"), CASES)
def test_a_step_interrupted_on_one_rank_ends_as_if_nothing_had_happened(
    stage: int, offload: str, where: str, micro_batch: int | None, grad_reduction: str, times: int
) -> None:
    """Bit for bit, dropout and the loss's own state included, and so does the step after it."""
    as_if_nothing_had_happened(2, stage, offload, where, micro_batch, grad_reduction, times)


@pytest.mark.parametrize(
    ("stage", "offload", "layer"),
    [(2, "", "text_model.encoder.layers.1"), (2, "optimizer", FIRST), (3, "", FIRST), (3, "optimizer", FIRST)],
)
def test_alone_a_backward_pass_that_reduces_recovers_too(stage: int, offload: str, layer: str) -> None:
    """DeepSpeed has reduced some gradients already and holds others in a bucket; no other rank waits for them."""
    as_if_nothing_had_happened(1, stage, offload, "backward", 4, "per_micro_batch", 1, layer)


def as_if_nothing_had_happened(
    world: int,
    stage: int,
    offload: str,
    where: str,
    micro_batch: int | None,
    grad_reduction: str,
    times: int,
    layer: str = "text_model.encoder.layers.1",
) -> None:
    arguments = (stage, offload, where, micro_batch, grad_reduction, times, layer)
    ranks = run_ranks(interrupted, world, *arguments, timeout=180)
    for broken, whole in ranks:
        assert broken["result"] == whole["result"]
        assert broken["result"].micro_batch == (micro_batch or 8) // 2**times
        assert broken["calls"] == whole["calls"] == 2
        assert broken["next number"] == whole["next number"]
        assert broken["next loss"] == whole["next loss"]
    broken, whole = ranks[0]
    assert max(float(gradient.norm()) for gradient in whole["gradients"].values()) > 0
    for name, gradient in whole["gradients"].items():
        assert torch.equal(broken["gradients"][name], gradient), name


def loss_alone_is_too_large() -> str:
    loss = CountingLoss()
    loss.failures = 1
    with pytest.raises(UserError) as raised:
        train_step(Case().engine(), local_slice(global_batch(ROWS)), loss, 2)
    return str(raised.value)


def test_a_loss_that_does_not_fit_beside_nothing_is_not_tried_again() -> None:
    for message in run_ranks(loss_alone_is_too_large, 2):
        assert message.startswith(
            "out of memory in the loss, which needs the same memory with any batch.micro_batch: lower loss.tile_rows"
        )


def without_dropout() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = Case(stage=2).engine()
    train_step(engine, local_slice(global_batch(ROWS, 1)), GatheredSigmoid(), 4)
    whole = captured(engine)
    Fault(engine.module.towers.text_model.encoder.layers[1], "second pass")
    train_step(engine, local_slice(global_batch(ROWS, 1)), GatheredSigmoid(), 4)
    return whole, captured(engine)


def test_without_dropout_the_result_is_that_of_the_larger_micro_batch_too() -> None:
    whole, repeated = run_ranks(without_dropout, 2)[0]
    assert max(relative_errors(repeated, {name: value.double() for name, value in whole.items()}).values()) < 1e-5


def fails_always(stage: int, where: str, grad_reduction: Any) -> tuple[str, float]:
    engine = Case(stage=stage).engine()
    train_step(engine, local_slice(global_batch(ROWS, 1)), GatheredSigmoid(), 2)
    Fault(engine.module.towers.text_model.encoder.layers[1], where, times=100)
    start = time.monotonic()
    try:
        train_step(engine, local_slice(global_batch(ROWS, 1)), GatheredSigmoid(), 2, grad_reduction=grad_reduction)
    except (UserError, RuntimeError) as error:
        if distributed.rank() == 1:
            torch.distributed.destroy_process_group()  # as a process that ends does
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    raise AssertionError("there was not that much memory")


def test_one_pair_too_many_is_said_with_what_would_help() -> None:
    for message, _ in run_ranks(fails_always, 2, 1, "second pass", "per_step"):
        assert message.startswith("UserError: out of memory with one pair at a time")
        assert "ds_config" in message
        assert "recompute" in message


class BrokenOff(GatheredSigmoid):
    """Runs out of memory on rank 1 where the other waits for it in an exchange."""

    def forward(self, z: Embeddings) -> Tensor:
        if distributed.rank() == 1:
            raise torch.OutOfMemoryError("injected")
        return super().forward(z)


def breaks_off() -> tuple[str, float]:
    engine = Case().engine()
    start = time.monotonic()
    try:
        train_step(engine, local_slice(global_batch(ROWS)), BrokenOff(), 2)
    except (UserError, RuntimeError) as error:
        if distributed.rank() == 1:
            torch.distributed.destroy_process_group()
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    raise AssertionError("there was not that much memory")


def test_a_loss_that_leaves_its_peers_waiting_ends_the_run_at_once() -> None:
    (_, waited), (message, _) = run_ranks(breaks_off, 2)
    assert message.startswith("UserError: rank 1 ran out of memory in the loss")
    assert waited < 15


@pytest.mark.parametrize(
    ("stage", "where", "grad_reduction"),
    [(3, "first pass", "per_step"), (3, "backward", "per_step"), (2, "backward", "per_micro_batch")],
)
def test_amid_an_exchange_the_run_ends_at_once_and_says_why(stage: int, where: str, grad_reduction: str) -> None:
    """Peers inside a collective cannot be told: they must not sit there until the timeout (60 s here)."""
    (_, waited), (message, _) = run_ranks(fails_always, 2, stage, where, grad_reduction)
    assert message.startswith("UserError: rank 1 ran out of memory")
    assert "micro_batch" in message
    assert waited < 15


def peak_of_step(rows: int, micro_batch: int) -> tuple[int, int]:
    """Bytes of tensors alive at the peak of a step, beyond those before it; and those of the cached inputs and
    embeddings."""
    engine = Case(stage=2).engine()
    batch = global_batch(rows).split(rows // distributed.world_size())[distributed.rank()]
    train_step(engine, global_batch(64).split(32)[0], LinearLoss(), micro_batch)
    with TensorMemory() as memory:
        train_step(engine, batch, LinearLoss(), micro_batch)
    width = engine.module.embed_dim
    return memory.peak, 2 * 2 * 4 * batch.rows * width


class LinearLoss(nn.Module):
    """Costs no memory of its own: what is left is the step's."""

    def forward(self, z: Embeddings) -> Tensor:
        return (z.image[0] * z.text[0]).sum() * z.scale.sum() + z.bias.sum()


@pytest.mark.parametrize(("few", "many"), [(512, 2048), pytest.param(1024, 32768, marks=pytest.mark.slow)])
def test_peak_memory_grows_by_the_cached_embeddings_alone(few: int, many: int) -> None:
    """At a fixed micro-batch: image and text embeddings and their gradients, 16 d bytes a local pair."""
    (small, small_cache), _ = run_ranks(peak_of_step, 2, few, 32)
    (large, large_cache), _ = run_ranks(peak_of_step, 2, many, 32, timeout=600)
    print(f"peak of a step: {small} bytes at {few} pairs, {large} at {many}; stated growth {large_cache - small_cache}")
    stated = large_cache - small_cache
    assert small > small_cache
    assert 0.9 * stated <= large - small <= 1.05 * stated, (large - small, stated)


def peak_with_lock(locked: bool) -> tuple[int, int]:
    """Bytes at the peak of a one-pass step beyond those before it, and bytes of the image tower's trainable
    parameters."""
    model = tiny_model("siglip", layers=4, width=128, lock=LockSettings(image=locked))
    size = sum(p.nbytes for name, p in model.named_parameters() if "vision" in name)
    engine = build_engine(
        model, build_optimizer(model, AdamWSettings()), EngineSettings(ds_config="zero0", precision="fp32")
    )
    train_step(engine, tiny_batch(8), LinearLoss())
    with TensorMemory() as memory:
        train_step(engine, tiny_batch(8), LinearLoss())
    assert all(p.grad is None for name, p in model.named_parameters() if locked and "vision" in name)
    return memory.peak, size


def test_a_locked_tower_costs_no_gradient_memory() -> None:
    """Measured: the whole step with it locked needs less memory than its gradients alone."""
    [(whole, size)] = run_ranks(peak_with_lock, 1, False)
    [(locked, _)] = run_ranks(peak_with_lock, 1, True)
    print(
        f"peak of a step beyond the state: {whole} bytes, {locked} with the image tower locked; it has {size} bytes "
        f"of weights"
    )
    assert locked < size < whole
