"""Bad steps leave no trace; clipping, spikes, the ceiling of the scale and the rate are the same at every ZeRO
stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense_step import Case, GatheredSigmoid, captured, global_batch, local_slice, weights
from tests.support.forked_ranks import run_ranks
from trainer.core import distributed
from trainer.core.types import Embeddings, UserError
from trainer.optim import AdamWSettings, Guard, SpikeSettings, build_optimizer
from trainer.step import StepResult, train_step


class Troubled(GatheredSigmoid):
    """Multiplies the loss (and so its gradient) by ``factor``, on rank 1 alone where ``alone``; or poisons the gradient
    only."""

    factor = 1.0
    alone = False
    poison = False

    def forward(self, z: Embeddings) -> Tensor:
        mine = distributed.rank() == 1 or not self.alone
        if self.poison and mine:
            z.image.register_hook(lambda gradient: gradient * math.nan)
        return super().forward(z) * (self.factor if mine else 1.0)


def train(
    stage: int, offload: str, grad_reduction: Any, troubles: list[dict[str, Any]]
) -> tuple[list[StepResult], dict[str, Tensor]]:
    """Plain gradient descent, so that weights show every gradient that was used; a step for each of ``troubles``."""
    engine = Case(stage=stage, offload=offload).engine(lambda parameters: torch.optim.SGD(parameters, lr=1e-2))
    guard = Guard(AdamWSettings(spike=SpikeSettings(action="skip", window=10), max_bad_steps=2))
    results = []
    for seed, trouble in enumerate(troubles):
        loss = Troubled()
        for name, value in trouble.items():
            setattr(loss, name, value)
        results.append(
            train_step(engine, local_slice(global_batch(16, seed)), loss, 4, grad_reduction=grad_reduction, guard=guard)
        )
        guard.check()
    return results, weights(engine)


STAGES = [
    (0, "", "per_step"),
    (1, "", "per_step"),
    (2, "", "per_micro_batch"),
    (2, "optimizer", "per_step"),
    (3, "", "per_step"),
    (3, "optimizer", "per_micro_batch"),
]


@pytest.mark.parametrize(("stage", "offload", "grad_reduction"), STAGES)
def test_bad_steps_are_skipped_on_all_ranks_and_leave_no_trace(stage: int, offload: str, grad_reduction: str) -> None:
    nan_loss, nan_gradient, spike = (
        {"factor": math.nan, "alone": True},
        {"poison": True, "alone": True},
        {"factor": 1e4},
    )
    troubles: list[dict[str, Any]] = [{}, nan_loss, {}, nan_gradient, {}, spike, {}]
    both = run_ranks(train, 2, stage, offload, grad_reduction, troubles, timeout=180)
    results, bad = both[0]
    assert [result.skipped for result in results] == ["", "not finite", "", "not finite", "", "spike", ""]
    assert [result.skipped for result in both[1][0]] == [result.skipped for result in results]
    assert math.isnan(results[1].loss)
    assert results[3].grad_norm == math.inf

    def plain() -> tuple[list[StepResult], dict[str, Tensor]]:
        engine = Case(stage=0).engine(lambda parameters: torch.optim.SGD(parameters, lr=1e-2))
        found = [train_step(engine, local_slice(global_batch(16, seed)), GatheredSigmoid(), 4) for seed in (0, 2, 4, 6)]
        return found, weights(engine)

    good_results, good = run_ranks(plain, 2)[0]
    for index, result in zip((0, 2, 4, 6), good_results, strict=True):
        assert results[index].grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
        assert results[index].loss == pytest.approx(result.loss, rel=1e-6)
    for name, weight in good.items():
        torch.testing.assert_close(bad[name], weight, rtol=1e-6, atol=1e-7, msg=name)


def diverge() -> str:
    try:
        train(1, "", "per_step", [{"factor": math.inf}] * 3)
    except UserError as error:
        return str(error)
    raise AssertionError("it went on")


def test_a_run_that_diverged_ends_on_all_ranks() -> None:
    for message in run_ranks(diverge, 2):
        assert "not finite in 2 steps in a row" in message


def clipped(stage: int, clip: float, spike_limit: bool) -> tuple[StepResult, dict[str, Tensor]]:
    engine = Case(stage=stage).engine(clip=clip)
    guard = Guard(AdamWSettings(spike=SpikeSettings(action="clip", factor=2, window=1)))
    if spike_limit:
        guard.judge(0.01)
    return train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 4, guard=guard), captured(engine)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_clipping_is_the_recipes_and_off_when_it_says_so(stage: int) -> None:
    """DeepSpeed clips at 1.0 unless it is told not to."""
    result, whole = run_ranks(clipped, 2, stage, 0.0, False)[0]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in whole.values()))
    assert norm > 1.0
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    limits = [(0.5, False, 0.5), (0.5, True, 0.02), (0.0, True, 0.02), (0.01, True, 0.01)]
    for clip, spike_limit, limit in limits if stage == 0 else limits[:2]:
        again, cut = run_ranks(clipped, 2, stage, clip, spike_limit)[0]
        assert again.grad_norm == pytest.approx(norm, rel=1e-5)  # reported as it was
        for name, gradient in cut.items():
            torch.testing.assert_close(gradient, whole[name] * (limit / norm), rtol=1e-4, atol=1e-9, msg=name)


def capped(stage: int) -> list[float]:
    """Scales that three steps meet, under a ceiling of 9 (the model starts at 10)."""
    engine = Case(stage=stage).engine(lambda parameters: torch.optim.SGD(parameters, lr=1e-4))
    scales = []
    for seed in range(3):
        scales.append(train_step(engine, local_slice(global_batch(16, seed)), GatheredSigmoid(), 4).scale)
        engine.cap_scale(9.0)
    return scales


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_ceiling_of_the_scale_holds_in_every_copy(stage: int) -> None:
    for scales in run_ranks(capped, 2, stage):
        assert scales[0] == pytest.approx(10.0)
        assert 8.9 < scales[1] <= 9.0001
        assert 8.9 < scales[2] <= 9.0001


def one_rate(stage: int) -> float:
    """How far the weights move at the rate that was set, in units of the gradient at rate 1."""
    engine = Case(stage=stage).engine(lambda parameters: torch.optim.SGD(parameters, lr=123.0))
    before = weights(engine)
    engine.set_learning_rate(0.25)
    result = train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 4)
    after = weights(engine)
    return (
        math.sqrt(sum(float((after[name].double() - before[name]).square().sum()) for name in before))
        / result.grad_norm
    )


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_rate_is_the_one_that_was_set(stage: int) -> None:
    assert run_ranks(one_rate, 2, stage)[0] == pytest.approx(0.25, rel=1e-4)


def test_adamw_comes_from_the_recipe() -> None:
    model = Case().model()
    assert isinstance(build_optimizer(model, AdamWSettings()), torch.optim.AdamW)
