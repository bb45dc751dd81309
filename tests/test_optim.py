"""The rate, the parameter groups, and the guard's verdicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.support.tiny_models import tiny_model
from trainer.core.partitioned import Moment
from trainer.core.settings import Settings, parse
from trainer.core.types import UserError
from trainer.optim import (
    AdafactorSettings,
    AdamWSettings,
    Guard,
    LambSettings,
    LionSettings,
    MuonSettings,
    OptimSettings,
    SpikeSettings,
    build_optimizer,
    learning_rate,
    moment_bytes,
    scale_ceiling,
    trained_shapes,
)


def test_rate_warms_up_and_follows_a_cosine() -> None:
    settings = AdamWSettings(lr=2.0, warmup=0.1)
    rates = [learning_rate(settings, seen, 1000) for seen in (0, 50, 100, 550, 1000, 2000)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0, 0.0], abs=1e-12)


def test_rate_with_warmup_in_samples_and_a_floor() -> None:
    settings = AdamWSettings(lr=1.0, warmup=200, final=0.1)
    assert learning_rate(settings, 100, 1000) == 0.5
    assert learning_rate(settings, 1000, 1000) == pytest.approx(0.1)
    assert learning_rate(settings, 600, 1000) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(AdamWSettings(lr=1.0, warmup=0, schedule="constant"), 999, 1000) == 1.0
    assert learning_rate(AdamWSettings(lr=1.0, warmup=5000), 1000, 1000) == 0.2  # a run shorter than its warm-up


def test_vectors_scale_and_bias_are_not_decayed() -> None:
    model = tiny_model()
    next(model.towers.vision_model.parameters()).requires_grad_(False)
    decayed, plain = build_optimizer(model, AdamWSettings(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0
    assert decayed["betas"] == (0.9, 0.95)
    assert {p.dim() > 1 for p in decayed["params"]} == {True}
    assert {p.dim() > 1 for p in plain["params"]} == {False}
    assert any(p is model.head.logit_scale for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())


OPTIMIZERS = [
    AdamWSettings(),
    AdamWSettings(moments="bfloat16"),
    AdamWSettings(moments="int8"),
    AdafactorSettings(),
    LionSettings(),
    MuonSettings(),
    LambSettings(moments="int8"),
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda settings: f"{settings.name}-{len(settings.model_fields)}")
def test_moments_take_what_the_planner_is_told(settings: OptimSettings) -> None:
    model = tiny_model(layers=1, width=64)
    optimizer = build_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    dense = [value.nbytes for value in held if torch.is_tensor(value) and value.dim()]
    moments = [value.num_bytes for value in held if isinstance(value, Moment)]
    assert sum(dense) + sum(moments) == pytest.approx(moment_bytes(settings, trained_shapes(model)), rel=1e-3)


def test_a_recipe_without_a_name_is_adamw_and_others_refuse_its_keys() -> None:
    class Recipe(Settings):
        optim: OptimSettings = AdamWSettings()

    assert parse(Recipe, {"optim": {"lr": 3e-4, "eps": 1e-6}}, "recipe").optim == AdamWSettings(lr=3e-4, eps=1e-6)
    lion = parse(Recipe, {"optim": {"name": "lion", "lr": 1e-4, "moments": "bfloat16"}}, "recipe").optim
    assert lion == LionSettings(lr=1e-4, moments="bfloat16")
    with pytest.raises(UserError, match=r"unknown key 'optim\.eps'"):
        parse(Recipe, {"optim": {"name": "lion", "eps": 1e-6}}, "recipe")
    with pytest.raises(UserError, match=r"'optim\.name' is 'lionn'.* did you mean 'lion'"):
        parse(Recipe, {"optim": {"name": "lionn"}}, "recipe")


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(UserError, match="every parameter is locked"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), AdamWSettings())


def guard(action: str = "skip", **more: int) -> Guard:
    return Guard(AdamWSettings(spike=SpikeSettings(action=action, factor=10, window=20), **more))  # type: ignore[arg-type]


def test_spikes_are_told_from_the_norms_before_them() -> None:
    judge = guard()
    assert judge.judge(1000.0) == "step"  # nothing is known yet
    assert judge.limit is None
    for _ in range(10):
        assert judge.judge(1.0) == "step"
    assert judge.limit == 10.0
    assert judge.judge(9.9) == "step"
    assert judge.judge(10.1) == "skip"
    assert judge.num_spikes == 1
    for _ in range(100):
        judge.judge(1e9)
    assert judge.limit is not None
    assert judge.limit >= 100  # what persists is no spike: the limit rises, a factor at a time


@pytest.mark.parametrize(("action", "verdict"), [("count", "step"), ("skip", "skip"), ("clip", "clip")])
def test_a_spike_is_treated_as_the_recipe_says(action: str, verdict: str) -> None:
    judge = guard(action)
    for _ in range(5):
        judge.judge(1.0)
    assert judge.judge(100.0) == verdict
    assert judge.num_spikes == 1


def test_what_is_not_finite_is_skipped_and_ends_the_run_when_it_goes_on() -> None:
    judge = guard(max_bad_steps=3)
    for bad in (math.nan, math.inf):
        assert judge.judge(bad) == "skip"
    assert judge.judge(1.0) == "step"  # in a row, not in all
    assert judge.judge(math.nan) == "skip"
    assert judge.judge(math.nan) == "skip"
    judge.check()
    assert judge.judge(math.nan) == "skip"
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        judge.check()
    assert judge.num_bad_steps == 5


def test_a_resumed_guard_judges_alike() -> None:
    first, second = guard(), guard()
    for norm in (1.0, 2.0, 1.5, math.nan, 50.0):
        first.judge(norm)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.limit == first.limit
    assert [second.judge(n) for n in (3.0, 90.0)] == [first.judge(n) for n in (3.0, 90.0)]


def test_ceiling_is_never_below_the_start() -> None:
    assert scale_ceiling(AdamWSettings(), 5.0) is None
    assert scale_ceiling(AdamWSettings(max_scale=100), 10.0) == 100
    so400m = math.exp(4.7215)
    assert scale_ceiling(AdamWSettings(max_scale=100), so400m) == so400m


def test_fused_adamw_is_adamw() -> None:
    """The kernel that RingLIP steps with, against the formula of the paper (arXiv 1711.05101)."""
    weight, gradient = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    layer = nn.Linear(3, 5, bias=False).double()
    layer.weight.data.copy_(weight)
    optimizer = build_optimizer(layer, AdamWSettings(lr=0.1, weight_decay=0.2, eps=1e-6))
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2):
        layer.weight.grad = gradient * step
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient * step
        second = 0.95 * second + 0.05 * (gradient * step) ** 2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * update
    torch.testing.assert_close(layer.weight.data, weight, rtol=1e-12, atol=1e-12)
