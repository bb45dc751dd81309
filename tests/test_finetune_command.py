"""`python -m trainer.finetune`: what it holds out, what it chooses and why, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from data_tools.format.index import Dataset
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, make_shards
from tests.support.tiny_models import tiny_captions, tiny_model, tiny_pretrained
from trainer.config import load
from trainer.core.types import UserError
from trainer.data.captions import CaptionSurvey
from trainer.finetune import __main__ as command
from trainer.finetune import sweep
from trainer.finetune.calibrate import calibrated_bias, solve
from trainer.finetune.choose import Plan, batch_size, choose
from trainer.finetune.data import Data, captions, split
from trainer.finetune.finish import last_line
from trainer.finetune.mix import Scores
from trainer.finetune.split import hold_out, same_side


def test_what_shares_a_picture_or_a_caption_is_one_group() -> None:
    pictures = [[1], [2], [1], [3], [4], [5]]
    texts = [["a"], ["b", "c"], ["d"], ["c"], ["e"], ["d", "f"]]
    groups = same_side(pictures, texts).tolist()
    assert len(set(groups)) == 3
    assert groups[0] == groups[2] == groups[5] and groups[1] == groups[3]


@pytest.mark.parametrize("seed", range(3))
def test_about_a_tenth_is_held_out_in_whole_groups(seed: int) -> None:
    dice = np.random.default_rng(seed)
    sides = dice.integers(0, 800, 1000)
    held = hold_out(sides, seed=seed)
    assert 90 <= held.sum() <= 100
    assert not set(sides[held]) & set(sides[~held])


def test_of_classes_each_gives_its_share() -> None:
    classes = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    held = hold_out(np.arange(100), classes, wanted=20)
    assert [int(held[np.array(classes) == name].sum()) for name in "abc"] == [12, 6, 2]


def test_a_set_of_one_group_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"only 0 of 50 pairs can be held out .*--for FIELD"):
        hold_out(np.zeros(50, np.int64))


def test_views_part_no_equal_captions(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "pairs", [f"{word} {n}" for n in range(100) for word in ("red", "red")])
    told: list[str] = []
    train_view = split(str(shards), tmp_path / "data", None, told)
    seen = []
    for part in (train_view, str(tmp_path / "data" / "validation")):
        from trainer.data.open import open_source
        from trainer.data.settings import DataSettings, SourceSettings

        source = open_source(SourceSettings(path=part), DataSettings())
        seen.append([text for sample in range(source.size) for text in captions(source, sample)])
    assert len(seen[0]) + len(seen[1]) == 200 and 15 <= len(seen[1]) <= 20
    assert not set(seen[0]) & set(seen[1])
    assert "held out: " in told[0] and "100 with images or captions equal to another's" in told[0]
    assert split(str(shards), tmp_path / "data", None, told) == train_view, "a second start splits nothing anew"


@pytest.mark.parametrize("batch", [8, 4096])
def test_the_bias_is_where_the_loss_of_the_batch_is_least(batch: int) -> None:
    """Against a scan in float64 of the loss that such batches have on average."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(40, 40, generator=generator, dtype=torch.float64) + 20 * torch.eye(40)
    found = solve(logits, batch)
    off = ~torch.eye(40, dtype=torch.bool)

    def loss(bias: float) -> float:
        positive = torch.nn.functional.softplus(-logits.diagonal() - bias).mean()
        return (positive + (batch - 1) * torch.nn.functional.softplus(logits[off] + bias).mean()).item()

    scan = np.arange(-40, 20, 0.01)
    assert abs(found - scan[np.argmin([loss(bias) for bias in scan])]) < 0.02


def test_the_bias_is_read_from_training_pairs(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "pairs", tiny_captions(80))
    model = tiny_pretrained("siglip", tmp_path / "base")
    biases = [calibrated_bias(model, str(shards), batch) for batch in (32, 32 * 1024)]
    assert biases[0] - biases[1] == pytest.approx(np.log(1024), abs=1.5), "a larger batch wants a lower one"


@pytest.fixture(autouse=True)
def no_shards_to_look_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trained" not in request.fixturenames:
        monkeypatch.setattr("trainer.finetune.choose.calibrated_bias", lambda *_: -7.0)


def plan_for(samples: int, parameters: int = 1, **options: Any) -> Plan:
    model = tiny_model(options.pop("kind", "siglip"))
    model.register_parameter("padding", torch.nn.Parameter(torch.empty(parameters, device="meta")))
    survey = CaptionSurvey(100, {1: 100}, options.pop("cut", 0.0), 90)
    data = Data("shards/train", "shards/validation", samples, 100, survey, 0)
    return choose("base", model, data, Path("out"), **options)


def test_choices_follow_the_data_and_the_model_and_each_has_a_reason() -> None:
    small, few, many = plan_for(5000), plan_for(5000, 10**8), plan_for(200_000, 10**8)
    assert [plan.tree["model"].get("lora") is None for plan in (small, few, many)] == [True, False, True]
    assert [plan.tree["optim"]["lr"] for plan in (small, few, many)] == [1e-5, 2e-4, 1e-5]
    assert [plan.tree["batch"]["size"] for plan in (small, many)] == [256, 1024]
    assert "5,000 pairs are few for 100 M parameters" in " ".join(few.reasons)
    assert plan_for(5000, adapter=True).tree["model"]["lora"] == {"rank": 16}
    assert "num_tokens" not in plan_for(5000, kind="clip", cut=0.05).tree["model"]
    assert plan_for(5000, kind="clip", cut=0.3).tree["model"]["num_tokens"] == 248
    replayed = plan_for(7000, replay="old").recipe()
    assert [(source.path, source.weight) for source in replayed.data.sources] == [("shards/train", 0.7), ("old", 0.3)]
    general = plan_for(5000, general="shards/coco", label="kind")
    assert general.recipe().checkpoint.best == ("kind_top1",)
    assert general.general == ("coco/image_to_text_r1", "coco/text_to_image_r1")
    assert small.recipe().model.bias == -7 and plan_for(5000, kind="clip").recipe().model.bias is None
    assert [batch_size(n, 1) for n in (10, 40, 600, 10**6)] == [8, 32, 32, 1024]


def test_the_last_line_says_what_was_gained_and_lost() -> None:
    plan = Plan({}, own=("image_to_text_r1",), general=("coco/image_to_text_r1",))
    assert last_line(plan, Scores(0.312, 0.63), Scores(0.584, 0.621), 0.8) == (
        "R@1 31.2 -> 58.4; on your general set 63.0 -> 62.1 (weights: 0.8 trained, 0.2 base)"
    )


def test_the_rate_that_gains_most_at_no_loss_is_taken_and_minutes_shorten_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {1e-5: (0.32, 0.6), 5e-5: (0.4, 0.598), 2.5e-4: (0.5, 0.45), 1.25e-3: (0.5, 0.2)}
    mixed = {2.5e-4: 0.35, 1.25e-3: 0.3}  # where too much is forgotten, what is left once it is mixed with the base

    def train(recipe: Path, run: Path, gpus: int, quiet: bool = False) -> None:
        rate = load(recipe).optim.peak
        assert load(recipe).run.samples == 30 * 256 and not load(recipe).checkpoint.best
        lines: list[dict[str, Any]] = [{"samples_seen": 256, "loss": 1.0, "pairs_per_second": 100.0}]
        for samples, (own, general) in ((0, (0.3, 0.6)), (7680, found[rate])):
            values = {f"validation/{way}_r1": own for way in ("image_to_text", "text_to_image")}
            values |= {f"coco/{way}_r1": general for way in ("image_to_text", "text_to_image")}
            lines.append({"samples_seen": samples, "eval": values})
        (run / "checkpoints").mkdir(parents=True)
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def mix(plan: Plan, path: str, run: Path, before: Scores) -> tuple[Scores, float]:
        return Scores(mixed[float(run.parent.name.removeprefix("rate-"))], 0.6), 0.3

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "_mixed", mix)
    plan = plan_for(5000, general="shards/coco")
    before = plan.tree["run"]["samples"]
    sweep.sweep(plan, "base", tmp_path, 5.0, 1)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "base: 30.0; general set 60.0"
    assert said[2] == "rate 5e-05: 40.0; general set 59.8 after 7,680 pairs"
    assert (
        said[3] == "rate 0.00025: 35.0; general set 60.0 after 7,680 pairs, 0.3 of the way from the base"
        and len(said) == 5
    )
    assert plan.recipe().optim.lr == 5e-5 and "the best of short runs" in plan.reasons[-2]
    assert plan.tree["run"]["samples"] == 5 * 60 * 100 // 256 * 256 < before
    assert plan.recipe().eval.every == 11 * 256


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the recipes that the command trains: in forks of this process, which saves the imports."""
    recipes: list[str] = []

    def train(recipe: Path, run: Path, gpus: int, quiet: bool = False) -> None:
        recipes.append(recipe.parent.name)
        assert run_ranks(call, 1, recipe) == [0]

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr("trainer.finetune.choose.EPOCHS", ((1000, 3),))
    return recipes


def test_one_line_from_a_model_and_pairs_to_a_model_that_is_no_worse(
    tmp_path: Path, trained: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = make_shards(tmp_path / "pairs", [f"{text} {n}" for n, text in enumerate(tiny_captions(120))])
    general = make_shards(tmp_path / "general", tiny_captions(40, seed=5))
    tiny_pretrained("siglip", tmp_path / "base")
    out = tmp_path / "out"
    argv = [str(tmp_path / "base"), str(pairs), "--general", str(general), "--out", str(out), "--no-sweep"]
    assert command.main(argv) == 0
    said = capfd.readouterr()
    assert trained == ["out"]
    assert said.out.strip().splitlines()[-1].startswith("R@1 ") and "on your general set" in said.out
    assert (out / "recipe.yaml").read_text().startswith("# batch.size: 32 (")
    measured = json.loads((out / "evaluation.json").read_text())
    before, after = measured["base_metrics"], measured["metrics"]
    general = [name for name in before if name.startswith("shards/") and name.endswith("_r1")]
    assert sum(before[name] - after[name] for name in general) / 2 <= 0.01 + 1e-9
    assert AutoModel.from_pretrained(out / "model").config.model_type == "siglip"
    assert "## Measured" in (out / "model" / "README.md").read_text() and (out / "report.html").stat().st_size > 1000
    trained.clear()
    assert command.main([*argv, "--dry-run"]) == 0 and not trained
    assert "exists and is used unchanged" in capfd.readouterr().err


def test_manifests_of_views_name_their_maker(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "pairs", [f"caption {n}" for n in range(100)])
    split(str(shards), tmp_path / "data", None, [])
    assert Dataset.open(tmp_path / "data" / "train").manifest["view"]["command"] == "trainer.finetune"
