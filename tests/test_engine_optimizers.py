"""Every optimizer of a recipe under real DeepSpeed engines: every ZeRO stage, number of ranks and offload gives what one
process without an engine gives, and goes on from the checkpoint of every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_train
from tests.support.forked_ranks import run_ranks
from tests.support.held_parameters import alone, make_engine, train
from tests.support.held_parameters import wanted as gradients_of
from tests.support.runs import PLAIN, call, curve, stopped_at_step
from trainer.core.partitioned import BLOCK
from trainer.core.types import UserError
from trainer.engine.ema import average_weights, averaged
from trainer.engine.fragments import fragments
from trainer.engine.state import layout, read_state, restore_state, steps
from trainer.engine.state_names import AVERAGE, WEIGHT
from trainer.optim import (
    AdafactorSettings,
    AdamWSettings,
    LambSettings,
    LionSettings,
    MuonSettings,
    OptimizerSettings,
)
from trainer.optim.moments import LEAST
from trainer.runtime.signals import EXIT_AGAIN

shards, recipe = test_train.shards, test_train.recipe
COMMON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
OPTIMIZERS: dict[str, OptimizerSettings] = {
    "adamw bfloat16": AdamWSettings(moments="bfloat16", **COMMON),
    "adamw int8": AdamWSettings(moments="int8", **COMMON),
    "adafactor": AdafactorSettings(**COMMON),
    "lion": LionSettings(**COMMON),
    "muon": MuonSettings(**COMMON),
    "lamb": LambSettings(**COMMON),
}
SUMMED = ("adafactor", "lamb")
"""Sums over a tensor, taken in another order: float rounding. The others are equal to the bit."""
LAYOUTS = [(1, 2, False), (1, 3, True), (2, 0, False), (2, 1, False), (2, 2, True), (2, 3, False)]
SLOW = [(1, 0, False), (2, 2, False), (2, 3, True)]
Saved = tuple[dict[str, list[str]], dict[str, int], dict[tuple[str, str], Tensor]]


def state_of(engine: Any) -> Saved:
    """What a checkpoint holds; tensors on rank 0."""
    tensors = {(name, kind): tensor.clone() for name, kind, tensor in read_state(engine, 4 * 2 * BLOCK)}
    return {name: list(kinds) for name, kinds in layout(engine).items()}, steps(engine), tensors


def put_back(engine: Any, state: Saved) -> None:
    kinds, counts, tensors = state
    restore_state(engine, kinds, counts, lambda name, kind: tensors[name, kind], 4 * 2 * BLOCK)


def three_steps(stage: int, offload: bool) -> dict[str, tuple[dict[str, Tensor], dict[str, int]]]:
    """Of every optimizer: weights, and where this rank's part of each parameter begins."""
    found = {}
    for name, settings in OPTIMIZERS.items():
        engine = make_engine(settings, stage, offload)
        train(engine, 0, 3)
        starts = {piece.name: piece.start for piece in fragments(engine)}
        found[name] = {key: t for (key, kind), t in state_of(engine)[2].items() if kind == WEIGHT}, starts
    return found


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, Tensor]]:
    return {name: alone(settings, 3) for name, settings in OPTIMIZERS.items()}


def compare(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], starts: list[dict[str, int]]) -> None:
    """``starts``: where the ranks' parts begin, of every layout that the weights have met."""
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        if name in SUMMED:
            torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)
        elif name == "adamw int8":
            # Blocks that a partition cuts are rounded on a finer grid; three steps of 1e-2 differ by their rounding.
            whole = uncut(value, {one[key] for one in starts})
            assert whole.float().mean() > 0.9
            assert torch.equal(value.flatten()[whole], wanted[key].flatten()[whole]), key
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=2e-3)
        else:
            assert torch.equal(value, wanted[key]), key


def uncut(value: Tensor, starts: set[int]) -> Tensor:
    """False for elements of blocks that a partition cuts."""
    cut = [start // BLOCK for start in starts if start % BLOCK and value.numel() >= LEAST]
    return ~torch.isin(torch.arange(value.numel()) // BLOCK, torch.tensor(cut))


@pytest.mark.parametrize(
    ("ranks", "stage", "offload"), [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW)]
)
def test_where_tensors_live_does_not_matter(
    ranks: int, stage: int, offload: bool, wanted: dict[str, dict[str, Tensor]]
) -> None:
    results = run_ranks(three_steps, ranks, stage, offload)
    for name in OPTIMIZERS:
        compare(name, results[0][name][0], wanted[name], [result[name][1] for result in results])


def begin(stage: int) -> dict[str, tuple[Saved, dict[str, int]]]:
    """Of every optimizer: its checkpoint after two steps."""
    found = {}
    for name, settings in OPTIMIZERS.items():
        engine = make_engine(settings, stage)
        train(engine, 0, 2)
        found[name] = state_of(engine), {piece.name: piece.start for piece in fragments(engine)}
    return found


def go_on(stage: int, offload: bool, states: dict[str, Saved]) -> dict[str, tuple[Saved, Saved, dict[str, int]]]:
    """Another engine, with other weights, that has trained elsewhere, takes the checkpoint, gives it back and makes the
    third step."""
    found = {}
    for name, settings in OPTIMIZERS.items():
        engine = make_engine(settings, stage, offload, seed=1)
        train(engine, 50, 51)
        put_back(engine, states[name])
        back = state_of(engine)
        train(engine, 2, 3)
        found[name] = back, state_of(engine), {piece.name: piece.start for piece in fragments(engine)}
    return found


@pytest.fixture(scope="module")
def saved() -> list[dict[str, tuple[Saved, dict[str, int]]]]:
    return run_ranks(begin, 2, 3)


@pytest.mark.parametrize(
    ("ranks", "stage", "offload"),
    [(1, 0, False), (2, 1, True), pytest.param(1, 3, False, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_from_a_checkpoint_of_another_layout(
    ranks: int,
    stage: int,
    offload: bool,
    saved: list[dict[str, tuple[Saved, dict[str, int]]]],
    wanted: dict[str, dict[str, Tensor]],
) -> None:
    results = run_ranks(go_on, ranks, stage, offload, {name: state for name, (state, _) in saved[0].items()})
    for name in OPTIMIZERS:
        (kinds, counts, tensors), (_, _, after), _ = results[0][name]
        before = saved[0][name][0]
        assert (kinds, counts) == before[:2]
        starts = [result[name][-1] for result in (*saved, *results)]
        for (key, kind), value in tensors.items():
            whole = uncut(value, {one[key] for one in starts}) if name == "adamw int8" else slice(None)
            assert torch.equal(value.flatten()[whole], before[2][key, kind].flatten()[whole]), (name, key, kind)
        compare(name, {key: value for (key, kind), value in after.items() if kind == WEIGHT}, wanted[name], starts)


def averages(name: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """The running average by the engine and by hand, and whether forward sees it and forgets it."""
    engine = make_engine(OPTIMIZERS[name], stage)
    by_hand: dict[str, Tensor] = {}
    for step in range(3):
        train(engine, step, step + 1)
        average_weights(engine, 0.7)
        for (key, kind), value in state_of(engine)[2].items():
            if kind == WEIGHT:
                by_hand[key] = by_hand[key].lerp(value, 1 - 0.7) if key in by_hand else value
    before = engine(gradients_of(0)).item()
    with averaged(engine) as any_there:
        inside = engine(gradients_of(0)).item()
    assert any_there
    tensors = {key: value for (key, kind), value in state_of(engine)[2].items() if kind == AVERAGE}
    return tensors, by_hand, inside != before == engine(gradients_of(0)).item()


@pytest.mark.parametrize(("name", "stage"), [("adamw int8", 0), ("adafactor", 1), ("adamw int8", 3)])
def test_the_running_average_lies_among_their_moments(name: str, stage: int) -> None:
    found, by_hand, shown = run_ranks(averages, 2, name, stage)[0]
    assert shown
    assert found.keys() == by_hand.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, by_hand[key], rtol=0, atol=1e-6)


def other_optimizer() -> str:
    engine = make_engine(AdamWSettings(**COMMON), 1)
    train(engine, 0, 1)
    state = state_of(engine)
    other = make_engine(LionSettings(**COMMON), 1)
    with pytest.raises(UserError) as error:
        put_back(other, state)
    return str(error.value)


def test_the_moments_of_another_optimizer_are_refused() -> None:
    [text] = run_ranks(other_optimizer, 1)
    assert "keeps exp_avg, exp_avg_sq of held.tall.weight, this one exp_avg; set optim.name back" in text


def other_format() -> tuple[Saved, Saved]:
    engine = make_engine(AdamWSettings(**COMMON), 1)
    train(engine, 0, 2)
    state = state_of(engine)
    other = make_engine(AdamWSettings(moments="bfloat16", **COMMON), 1)
    put_back(other, state)
    return state, state_of(other)


def test_adamw_goes_on_with_smaller_moments() -> None:
    [(before, after)] = run_ranks(other_format, 1)
    for (name, kind), value in after[2].items():
        exact = before[2][name, kind]
        torch.testing.assert_close(value, exact if kind == WEIGHT else exact.bfloat16().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("optim", "before", "after", "ranks", "exact"),
    [
        ("{name: adafactor, lr: 3.0e-3, ema: 0.7}", "zero3", "zero2_offload", 1, False),
        ("{moments: int8, lr: 3.0e-3}", "zero1", "zero1", 2, True),
    ],
)
def test_a_stopped_run_of_the_command_goes_on(
    recipe: Path, tmp_path: Path, optim: str, before: str, after: str, ranks: int, exact: bool
) -> None:
    keys = [*PLAIN, f"optim={optim}", "run.samples=96"]
    assert run_ranks(call, 2, recipe, *keys, f"run.directory={tmp_path / 'whole'}") == [0] * 2
    assert run_ranks(stopped_at_step, 2, 3, recipe, *keys, f"engine.ds_config={before}") == [EXIT_AGAIN] * 2
    assert run_ranks(call, ranks, recipe, *keys, f"engine.ds_config={after}") == [0] * ranks
    found, expected = curve(tmp_path / "run"), curve(tmp_path / "whole")
    assert found == expected if exact else found == [pytest.approx(line, rel=1e-4) for line in expected]
