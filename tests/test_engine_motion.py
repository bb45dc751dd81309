"""How far a step moves the weights: the same at every ZeRO stage, checked against checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests import test_train
from tests.support.forked_ranks import run_ranks
from tests.support.runs import PLAIN, call, steps
from trainer.engine import motion
from trainer.models.param_groups import tower_of

shards, recipe = test_train.shards, test_train.recipe
SAVING = [*PLAIN, "run.samples=64", "checkpoint.every=16", "checkpoint.keep=9", "log.trackers=none"]


def ratios(run: Path, tower: str) -> list[float]:
    """Of the second step to the fourth, in float64, from the weights after each."""
    saved = [load_file(run / "checkpoints" / f"samples-{n:09d}" / "model.safetensors") for n in range(16, 65, 16)]
    names = [name for name in saved[0] if tower_of(name) == tower]
    found = []
    for before, after in pairwise(saved):
        moved = sum((after[name].double() - before[name].double()).square().sum() for name in names)
        size = sum(before[name].double().square().sum() for name in names)
        found.append(float((moved / size) ** 0.5))
    return found


@pytest.mark.parametrize(("elements", "off"), [(motion.ELEMENTS, 0.05), (10**9, 1e-3)])
@pytest.mark.parametrize(("world", "ds_config"), [(1, "zero0"), (2, "zero0"), (2, "zero1"), (2, "zero3")])
def test_it_is_the_norm_of_the_update_over_that_of_the_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, ds_config: str, elements: int, off: float
) -> None:
    monkeypatch.setattr(motion, "ELEMENTS", elements)
    assert run_ranks(call, world, recipe, *SAVING, f"engine.ds_config={ds_config}") == [0] * world
    lines = steps(tmp_path / "run")[1:]
    for tower in ("image", "text"):
        found = [line["vitals"][f"update_{tower}"] for line in lines]
        np.testing.assert_allclose(found, ratios(tmp_path / "run", tower), rtol=off)


def test_a_locked_tower_has_no_ratio(recipe: Path, tmp_path: Path) -> None:
    run_ranks(call, 1, recipe, "run.samples=16", "model.lock.image=true", "log.trackers=none")
    (line,) = steps(tmp_path / "run")
    assert "update_image" not in line["vitals"] and line["vitals"]["update_text"] > 0
