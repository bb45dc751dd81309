"""The running average of the weights: at every ZeRO stage, through checkpoints and with other ranks, in evaluation and
export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from tests import test_train
from tests.support.forked_ranks import run_ranks
from tests.support.runs import PLAIN, call, curve, mistake, stopped_at_step
from trainer import evaluate, export
from trainer.core.types import UserError
from trainer.runtime.signals import EXIT_AGAIN

shards, recipe = test_train.shards, test_train.recipe
DECAY = 0.7
EMA = [*PLAIN, f"optim.ema={DECAY}", "optim.eps=1e-4", "run.samples=96", "checkpoint.every=16", "checkpoint.keep=9"]


def averages(run: Path, samples: int = 96) -> dict[str, Tensor]:
    saved = load_file(run / "checkpoints" / f"samples-{samples:09d}" / "optimizer.safetensors")
    return {name.removesuffix(".ema"): value for name, value in saved.items() if name.endswith(".ema")}


def reference(run: Path) -> dict[str, Tensor]:
    """In float64, from the weights after each of the six steps."""
    found: dict[str, Tensor] = {}
    for samples in range(16, 97, 16):
        weights = load_file(run / "checkpoints" / f"samples-{samples:09d}" / "model.safetensors")
        for name, value in weights.items():
            found[name] = DECAY * found[name] + (1 - DECAY) * value.double() if name in found else value.double()
    return found


@pytest.mark.parametrize(
    "ds_config",
    [
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2_offload", "zero3_offload")),
    ],
)
def test_it_is_the_recursion_on_the_weights_of_every_step(recipe: Path, tmp_path: Path, ds_config: str) -> None:
    assert run_ranks(call, 2, recipe, *EMA, f"engine.ds_config={ds_config}") == [0] * 2
    found, expected = averages(tmp_path / "run"), reference(tmp_path / "run")
    assert found.keys() == expected.keys()
    weights = load_file(tmp_path / "run" / "checkpoints" / "samples-000000096" / "model.safetensors")
    assert max((weights[name] - found[name]).abs().max().item() for name in found) > 1e-3
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "ranks", "exact"), [("zero1", "zero1", 2, True), ("zero3", "zero2", 1, False)]
)
def test_a_stopped_run_goes_on_with_it(
    recipe: Path, tmp_path: Path, before: str, after: str, ranks: int, exact: bool
) -> None:
    assert run_ranks(call, 2, recipe, *EMA, "engine.ds_config=zero1", f"run.directory={tmp_path / 'whole'}") == [0] * 2
    assert run_ranks(stopped_at_step, 2, 3, recipe, *EMA, f"engine.ds_config={before}") == [EXIT_AGAIN] * 2
    assert run_ranks(call, ranks, recipe, *EMA, f"engine.ds_config={after}") == [0] * ranks
    found, expected = averages(tmp_path / "run"), averages(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0.0 if exact else 1e-5)


def test_evaluation_and_export_take_it(
    recipe: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_ranks(call, 2, recipe, *EMA, "engine.ds_config=zero3") == [0] * 2
    averaged, last = (evaluate.load_model(str(run), average)[0].state_dict() for average in (True, False))
    for name, value in averages(run).items():
        assert torch.equal(averaged[name], value)
    assert not torch.equal(averaged["head.logit_bias"], last["head.logit_bias"])
    command = [str(run), "--data", str(shards), "--limit", "0", "--ema", "--out", str(run / "evaluation.json")]
    assert evaluate.main(command) == 0
    assert json.loads((run / "evaluation.json").read_text())["average"] is True
    for options, name in ((["--ema"], "averaged"), ([], "last")):
        assert export.main([str(run), str(tmp_path / name), *options]) == 0
    said = capsys.readouterr().out
    assert "(averaged weights), not on" in said
    exported, plain = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("averaged", "last"))
    assert torch.equal(exported["logit_bias"], averaged["head.logit_bias"])
    assert torch.equal(plain["logit_bias"], last["head.logit_bias"])
    card = (tmp_path / "averaged" / "README.md").read_text()
    assert "running average with decay 0.7" in card
    assert "Measured" in card
    assert "Measured" not in (tmp_path / "last" / "README.md").read_text()


@pytest.mark.parametrize(
    "ds_config",
    [
        "zero0",
        "zero3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2_offload", "zero3_offload_params")),
    ],
)
def test_evaluation_in_training_is_of_it_and_leaves_no_trace(recipe: Path, tmp_path: Path, ds_config: str) -> None:
    """Metrics are those of ``evaluate --ema`` on that step's checkpoint; curve and checkpoints are, to the bit, those
    of a run without."""
    run, config = tmp_path / "run", small(ds_config, tmp_path)
    without = ["data.validation=''", f"run.directory={tmp_path / 'without'}"]
    assert run_ranks(call, 2, recipe, *EMA, config, "eval.every=32", "eval.limit=0") == [0] * 2
    assert run_ranks(call, 2, recipe, *EMA, config, *without) == [0] * 2
    notes = evaluations(run)
    assert [note["samples_seen"] for note in notes] == [32, 64, 96]
    assert not evaluations(tmp_path / "without")
    assert curve(run) == curve(tmp_path / "without")
    for name in ("model", "optimizer"):
        one, other = (
            load_file(where / f"checkpoints/samples-000000096/{name}.safetensors")
            for where in (run, tmp_path / "without")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    told = False
    for note in notes:
        averaged, last = (scores(run, note["samples_seen"], options) for options in (["--ema"], []))
        assert note["weights"] == "ema" and note["eval"] == averaged
        told |= averaged != last
    assert told, "the average has the metrics of the weights: nothing was shown"


def small(ds_config: str, folder: Path) -> str:
    """With nothing too small to be partitioned."""
    tree = json.loads((Path(__file__).parent.parent / "ds_configs" / f"{ds_config}.json").read_text())
    tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if ds_config.startswith("zero3") else {}
    (folder / "ds.json").write_text(json.dumps(tree))
    return f"engine.ds_config={folder / 'ds.json'}"


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "eval" in line]


def scores(run: Path, samples: int, options: list[str]) -> dict[str, float]:
    command = [
        str(run / f"checkpoints/samples-{samples:09d}"),
        "--limit",
        "0",
        *options,
        "--out",
        str(run / "evaluation.json"),
    ]
    assert run_ranks(evaluate.main, 2, command) == [0] * 2
    return json.loads((run / "evaluation.json").read_text())["metrics"]


def test_a_run_without_one_says_so_and_dropping_it_drops_it(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(call, 1, recipe, *EMA, "run.samples=32")
    assert averages(run, 32)
    run_ranks(call, 1, recipe, *EMA, "run.samples=48", "optim.ema=0")
    assert not averages(run, 48)
    with pytest.raises(UserError, match=r"has no running average of the weights; set optim\.ema"):
        evaluate.load_model(str(run), average=True)
    run_ranks(call, 1, recipe, *EMA, "run.samples=64")
    assert averages(run, 64)
    [text] = run_ranks(mistake, 1, recipe, "optim.ema=1")
    assert "'optim.ema'" in text
