"""Adafactor, LAMB and Muon against their definitions on whole tensors (float64), and torch's Muon bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.held_parameters import SHAPES, Model, alone, wanted, weights_of
from trainer.core.partitioned import Piece
from trainer.optim import AdafactorSettings, LambSettings, MuonSettings, build_optimizer, matrices
from trainer.optim.tensorwise import blocks

COMMON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
STEPS = 6


def start() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Weights in float64 and empty states."""
    weights = {name: value.double() for name, value in weights_of(Model()).items()}
    return weights, {name: {} for name in weights}


def gradient(name: str, step: int) -> Tensor:
    return wanted(step)[name.split(".")[-2]].double()


def adafactor() -> dict[str, Tensor]:
    """optax.scale_by_factored_rms and optax.ema as big_vision chains them (big_vision/optax.py)."""
    weights, states = start()
    for step in range(STEPS):
        beta = min(0.95, 1 - (step + 1.0) ** -0.8)
        for name, weight in weights.items():
            g, state = gradient(name, step), states[name]
            square = g.square() + 1e-30
            if weight.dim() == 2 and min(weight.shape) >= 32:
                row, column = square.mean(1), square.mean(0)
                state["row"] = beta * state.get("row", torch.zeros_like(row)) + (1 - beta) * row
                state["column"] = beta * state.get("column", torch.zeros_like(column)) + (1 - beta) * column
                second = torch.outer(state["row"], state["column"]) / state["row"].mean()
            else:
                second = beta * state.get("second", torch.zeros_like(g)) + (1 - beta) * square
                state["second"] = second
            state["momentum"] = 0.9 * state.get("momentum", torch.zeros_like(g)) + 0.1 * g / second.sqrt()
            weight -= 1e-2 * (state["momentum"] + (0.1 * weight if weight.dim() > 1 else 0.0))
    return weights


def test_adafactor_is_big_visions() -> None:
    expected = adafactor()
    for name, value in alone(AdafactorSettings(moments="float32", **COMMON), STEPS).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    rounded = alone(AdafactorSettings(**COMMON), STEPS)["held.wide.weight"]
    moved = (expected["held.wide.weight"] - weights_of(Model())["held.wide.weight"]).norm()
    assert 1e-5 < (rounded - expected["held.wide.weight"]).norm() / moved < 0.01


def lamb() -> dict[str, Tensor]:
    weights, states = start()
    for step in range(1, STEPS + 1):
        for name, weight in weights.items():
            g, state = gradient(name, step - 1), states[name]
            m = state["m"] = 0.9 * state.get("m", torch.zeros_like(g)) + 0.1 * g
            v = state["v"] = 0.95 * state.get("v", torch.zeros_like(g)) + 0.05 * g.square()
            update = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-6)
            if weight.dim() > 1:
                update += 0.1 * weight
                update *= weight.norm() / update.norm()
            weight -= 1e-2 * update
    return weights


def test_lamb_scales_the_update_of_a_tensor_to_its_norm() -> None:
    expected = lamb()
    for name, value in alone(LambSettings(**COMMON), STEPS).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_lamb_moves_a_tensor_of_zeros_at_the_plain_rate() -> None:
    layer = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(layer, LambSettings(lr=0.1))
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((3, 4), -0.1), rtol=1e-4, atol=0)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    model = Model()
    hidden = [name for name, p in model.named_parameters() if name in matrices(model)]
    assert hidden == ["held.tall.weight", "held.wide.weight", "held.small.weight"]
    named = dict(model.named_parameters())
    rest = [name for name in named if name not in hidden]
    optimizers = [
        torch.optim.Muon([named[name] for name in hidden], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        *(
            torch.optim.AdamW(
                [named[name] for name in rest if (named[name].dim() > 1) is decayed],
                lr=1e-2,
                betas=(0.9, 0.95),
                weight_decay=0.1 * decayed,
            )
            for decayed in (True, False)
        ),
    ]
    for step in range(STEPS):
        model.zero_grad()
        model(wanted(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in alone(MuonSettings(**COMMON), STEPS).items():
        if name in hidden:
            assert torch.equal(value, named[name]), name
        else:
            torch.testing.assert_close(value, named[name].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("start", "length"), [(0, 70 * 33), (5, 20), (40, 200), (33, 66), (2309, 1), (7, 0)])
def test_blocks_are_the_elements_of_a_part_of_a_matrix(start: int, length: int) -> None:
    rows, columns = SHAPES["tall"]
    parameter = nn.Parameter(torch.arange(rows * columns).view(rows, columns).float())
    part = Piece("w", parameter, (rows, columns), start, length, parameter, start)
    met: list[Tensor] = []
    for block in blocks(part, 70):
        there = parameter.detach()[block.row : block.row + block.height, block.column : block.column + block.width]
        assert torch.equal(block.of(part.weight), there)
        assert block.height * block.width <= 70
        met.append(there.flatten())
    assert torch.equal(torch.cat([*met, torch.zeros(0)]), part.weight)
