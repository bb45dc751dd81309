"""AdamW with moments of every format against torch's, and Lion against its definition, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.held_parameters import Model, alone, wanted, weights_of
from trainer.optim import AdamWSettings, LionSettings, build_optimizer
from trainer.optim.elementwise import LowPrecisionAdamW

COMMON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
STEPS = 6


def by_torch(settings: AdamWSettings) -> dict[str, Tensor]:
    model = Model().double()
    optimizer = build_optimizer(model, settings)
    assert type(optimizer) is torch.optim.AdamW
    for step in range(STEPS):
        optimizer.zero_grad()
        model({name: value.double() for name, value in wanted(step).items()}).backward()
        optimizer.step()
    return weights_of(model)


def test_float32_moments_are_torchs_adamw() -> None:
    expected = by_torch(AdamWSettings(**COMMON))
    model = Model()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "moments": "float32"}
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if (p.dim() > 1) is decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    optimizer = LowPrecisionAdamW(named, groups, **settings)  # type: ignore[arg-type]
    for step in range(STEPS):
        optimizer.zero_grad()
        model(wanted(step)).backward()
        optimizer.step()
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("moments", "most"), [("bfloat16", 0.01), ("int8", 0.05)])
def test_smaller_moments_move_the_weights_almost_alike(moments: str, most: float) -> None:
    expected, start = by_torch(AdamWSettings(**COMMON)), weights_of(Model())
    found = alone(AdamWSettings(moments=moments, **COMMON), STEPS)  # type: ignore[arg-type]
    name = "held.wide.weight"
    moved = (expected[name] - start[name]).norm()
    error = ((found[name] - expected[name]).norm() / moved).item()
    assert 1e-5 < error < most


def test_lion_is_the_sign_of_its_momentum() -> None:
    weights = {name: value.double() for name, value in weights_of(Model()).items()}
    moments = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(STEPS):
        gradients = {name: value.double() for name, value in wanted(step).items()}
        for name, weight in weights.items():
            gradient = gradients[name.split(".")[-2]]
            if weight.dim() > 1:
                weight *= 1 - 1e-2 * 0.1
            weight -= 1e-2 * (0.9 * moments[name] + 0.1 * gradient).sign()
            moments[name] = 0.99 * moments[name] + 0.01 * gradient
    for name, value in alone(LionSettings(**COMMON), STEPS).items():
        torch.testing.assert_close(value.double(), weights[name], rtol=1e-6, atol=1e-6)
