"""Advice on recorded curves (the quickstart's towers on the glyph pairs, sound and broken on purpose) and on real runs:
nothing on the sound ones; on the others what is wrong, and the true cause first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer import config
from trainer.metrics.advice import Advisor, Situation, chance_of
from trainer.report.curves import read_log

LINE = ("step", "samples_seen", "loss", "scale", "bad_steps")
VITALS = (
    "logit_matched", "logit_other", "logit_other_std", "image_to_text_r1", "text_to_image_r1", "cosine_images",
    "cosine_texts", "repeated", "update_image", "update_text",
)  # fmt: skip
CAUSES = {
    "shuffled table": "captions do not belong to their images",
    "shuffled table, softmax": "captions do not belong to their images",
    "blank images": "captions do not belong to their images, or these are blank",
    "rate too low": "the towers hardly move (1e-06 of their weights in a step): raise optim.lr",
    "rate too high": "the rate is too high, a step moves a tower by 11.0% of its weights: lower optim.lr",
    "rate that grows too high": "the rate is too high",
    "17 captions as negatives": "equal captions are negatives: set loss.same_group=positive",
    "hardest negatives": "loss.negatives keeps the hardest alone",
    "easiest negatives": "loss.negatives keeps the easiest alone",
    "hardest negatives, triplet": "loss.name=triplet",
    "global, rho too small": "its robust loss holds it down: raise loss.rho",
    "temperature's rate too high": "the temperature's own rate is too high: lower model.rates.head (50)",
}
RECORDED = [json.loads(line) for line in (Path(__file__).parent / "data" / "curves.jsonl").read_text().splitlines()]
SOUND = [run for run in RECORDED if run["kind"] == "sound"]
BROKEN = [run for run in RECORDED if run["kind"] != "sound"]


def records(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for numbers in run["lines"]:
        line = dict(zip((*LINE, *VITALS), numbers, strict=True))
        yield {key: line[key] for key in LINE} | {"vitals": {key: line[key] for key in VITALS}}


def advice(run: dict[str, Any]) -> list[str]:
    advisor = Advisor(Situation(**run["situation"]))
    return [text for record in records(run) for text in advisor.hear(record)]


@pytest.mark.parametrize("run", SOUND, ids=lambda run: run["name"])
def test_a_sound_run_is_left_in_peace(run: dict[str, Any]) -> None:
    assert advice(run) == []


@pytest.mark.parametrize("run", BROKEN, ids=lambda run: run["name"])
def test_a_broken_run_is_told_what_is_wrong_and_the_true_cause_first(run: dict[str, Any]) -> None:
    said = advice(run)
    kind, cause = run["kind"], CAUSES[run["name"]]
    assert said and said[0].startswith(f"this run {kind}: ")
    assert f"Likely causes, in order: {cause}" in said[0]
    assert len(said) == len({text.split(":")[0] for text in said}), "each kind once"


@pytest.mark.parametrize("name", ["softmax", "global, batch 128"])
def test_what_was_learnt_and_is_gone_is_divergence(name: str) -> None:
    sound, wrong = (next(run for run in RECORDED if run["name"] == one) for one in (name, "blank images"))
    lines = list(records(sound))
    end = lines[-1]
    lines += [
        record | {"step": end["step"] + record["step"], "samples_seen": end["samples_seen"], "loss": 4.85}
        for record in records(wrong)
    ]
    advisor = Advisor(Situation(**sound["situation"]))
    said = [text for line in lines for text in advisor.hear(line)]
    assert [text.partition(":")[0] for text in said] == ["this run diverges"]
    assert "set optim.clip=1, or optim.spike.action=clip" in said[0]


def test_steps_without_a_number_are_divergence_and_one_is_not() -> None:
    sound = next(iter(SOUND))
    advisor = Advisor(Situation(**sound["situation"]))
    for record in list(records(sound))[:20]:
        assert advisor.hear(record) == []
    lost = {"step": 201, "samples_seen": 25_728, "loss": math.nan, "scale": 10.0, "vitals": {}}
    assert advisor.hear(lost | {"bad_steps": 1}) == []
    assert advisor.hear(lost | {"bad_steps": 2})[0].startswith(
        "this run diverges: 2 steps since step 200 had no finite loss or gradient"
    )
    assert advisor.hear(lost | {"bad_steps": 3}) == []
    assert Advisor(Situation(**sound["situation"])).hear(lost | {"bad_steps": 2}), "of the first steps too"


@pytest.mark.parametrize(("batch", "ratio"), [(16, None), (128, None), (128, 16.0), (128, 1.0)])
def test_chance_of_a_sigmoid_is_the_least_loss_of_equal_logits(batch: int, ratio: float | None) -> None:
    count = batch - 1 if ratio is None else ratio
    logits = [step / 1000 for step in range(-10_000, 3000)]
    least = min(math.log1p(math.exp(-z)) + count * math.log1p(math.exp(z)) for z in logits)
    assert chance_of("sigmoid", batch, {"ratio": ratio, "weight": 1.0}) == pytest.approx(least, rel=1e-5)
    assert chance_of("softmax", batch) == pytest.approx(math.log(batch))
    assert chance_of("triplet", batch) is chance_of("softmax", 1) is chance_of("sigmoid", 1) is None


def test_the_recipe_says_what_to_expect() -> None:
    recipe = config.load(Path("trainer/recipes/glyphs.yaml"), ["loss.name=sigmoid", "data.noise.text=0.25"])
    found = Situation.of(recipe.model_dump(mode="json"))
    assert (found.batch, found.total, found.warmup, found.noise, found.head) == (128, 360_000, 36_000, 0.25, 10)
    assert found.chance == pytest.approx(5.848, abs=1e-3) and found.kept == ""
    kept = config.load(
        Path("trainer/recipes/glyphs.yaml"),
        ["loss.name=sigmoid", "loss.negatives.keep=easiest", "loss.negatives.ratio=4", "loss.negatives.warmup=0.5"],
    )
    found = Situation.of(kept.model_dump(mode="json"))
    assert found.kept == "easiest" and found.chance is None, "its loss changes with the ratio"


@pytest.mark.parametrize(
    ("overrides", "kind", "cause"),
    [
        ([], "", ""),
        (["data.noise.pairing=1"], "learns nothing", "data.noise spoils up to 100% of the pairs; captions do not"),
        (["optim.lr=0.3", "optim.clip=0"], "", "the rate is too high"),
        (["optim.lr=1e-8"], "learns nothing", "the towers hardly move"),
        (["data.train=FEW", "loss.same_group=negative"], "contradicts itself", "equal captions are negatives"),
    ],
)
def test_real_runs(tmp_path: Path, capfd: Any, overrides: list[str], kind: str, cause: str) -> None:
    shards = make_shards(tmp_path / "pairs", tiny_captions(80))
    few = make_shards(tmp_path / "few", ["a cat", "the dog", "red house"] * 30)
    tree: dict[str, Any] = {
        "run": {"directory": str(tmp_path / "run"), "samples": 1920},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(shards), "workers": 0},
        "batch": {"size": 16},
        "optim": {"lr": 3e-3, "eps": 1e-6},
        "engine": {"precision": "fp32", "ds_config": "zero0"},
        "log": {"every": 2, "line_seconds": 1000, "trackers": "none"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert run_ranks(call, 1, recipe, *(text.replace("FEW", str(few)) for text in overrides)) == [0]
    said, printed = read_log(tmp_path / "run" / "log.jsonl").advice, capfd.readouterr().err
    if not overrides:
        assert not said and "Likely causes" not in printed
        return
    assert said[0].startswith(f"this run {kind}") and f"in order: {cause}" in said[0]
    assert f"warning: {said[0]}" in printed.replace("\n", " ")
