"""What a recipe leaves open, decided: rates by what is trained, the loss by the model, groups by the captions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.tiny_models import tiny_config, tiny_model, tiny_tokenizer
from trainer.config import Recipe
from trainer.core.settings import parse
from trainer.data.captions import CaptionSurvey
from trainer.defaults import decide, kinds
from trainer.losses import SigmoidSettings, SoftmaxSettings
from trainer.models import ModelSettings

LORA = {"lora": {"rank": 4}}
PAIR = {"image": {"path": "vit"}, "text": {"path": "bert"}}
HALF_NEW = {"image": {"path": "vit"}, "text": {"config": {"model_type": "bert"}}, "tokenizer": "words"}


def recipe(model: dict[str, Any], **more: Any) -> Recipe:
    tree = {"run": {"samples": 100_000}, "model": model, "data": {}, "batch": {"size": 128}, **more}
    return parse(Recipe, tree, "recipe")


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        ({"config": {}, "tokenizer": "words"}, {"image": 1e-3, "text": 1e-3, "head": 1e-3}),
        ({"path": "clip"}, {"image": 1e-5, "text": 1e-5, "head": 1e-5}),
        ({"path": "clip", **LORA}, {"image": 2e-4, "text": 2e-4, "head": 2e-4}),
        ({"path": "clip", "lora": {"towers": "text"}, "num_tokens": 248}, {"text": 2e-4, "positions": 1e-5}),
        ({"path": "clip", "lock": {"image": True}}, {"text": 1e-5, "head": 1e-5}),
        ({"path": "clip", "lock": {"image": True, "image_layers": 2}}, {"image": 1e-5, "text": 1e-5}),
        (PAIR, {"image": 1e-5, "text": 1e-5, "projection": 1e-3, "head": 1e-3}),
        ({**HALF_NEW, "lock": {"image": True}}, {"text": 1e-3, "projection": 1e-3, "head": 1e-3}),
        (HALF_NEW, {"image": 1e-5, "text": 1e-3, "projection": 1e-3, "head": 1e-3}),
        ({"path": "clip", "rates": {"text": 0.5}}, {"image": 1e-5, "text": 5e-6}),
    ],
)
def test_each_part_learns_at_the_rate_of_what_it_is(model: dict[str, Any], rates: dict[str, float]) -> None:
    decided, told = decide(recipe(model), tiny_model())
    found = {part: decided.optim.peak * getattr(decided.model.rates, part) for part in rates}
    assert found == pytest.approx(rates)
    assert told[0].startswith("rate ") and told[0].endswith("(optim.lr auto)")
    assert decide(decided, tiny_model())[0] == decided, (
        "what is decided stays so when a run goes on from its recipe.yaml"
    )


def test_what_is_locked_has_no_rate() -> None:
    assert set(kinds(ModelSettings(path="clip", lock={"image": True, "scale": True}))) == {"text"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "lr", "batch", "said"),
    [
        (
            {"path": "clip"},
            1e-3,
            128,
            "image tower learns at 0.001, 100 times what whole pretrained towers usually take",
        ),
        ({"path": "clip"}, 1e-4, 128, ""),
        ({"path": "clip"}, 5e-4, 32_768, ""),
        ({"path": "clip", "rates": {"image": 0.01}}, 1e-3, 128, "text tower learns at 0.001"),
        ({"path": "clip", **LORA}, 1e-3, 128, ""),
        ({"path": "clip", **LORA}, 1e-2, 128, "50 times what LoRA"),
        ({"config": {}, "tokenizer": "words"}, 1e-6, 128, "little will be learnt"),
        ({"config": {}, "tokenizer": "words"}, 1e-3, 128, ""),
    ],
)
def test_a_rate_far_from_the_usual_is_told(model: dict[str, Any], lr: float, batch: int, said: str) -> None:
    given = recipe(model, optim={"lr": lr}, batch={"size": batch})
    decided, told = decide(given, tiny_model())
    assert decided.optim.lr == lr and told[0] == f"rate {lr:g}"
    assert [line for line in told if "warning" in line] == ([told[1]] if said else [])
    assert said in " ".join(told)


def test_the_loss_is_the_one_the_model_was_made_for() -> None:
    clip, siglip = tiny_model("clip"), tiny_model("siglip")
    new = recipe({"config": tiny_config("clip"), "tokenizer": tiny_tokenizer()}, loss={"tile_rows": 7})
    softmax = decide(new, clip)[0]
    assert softmax.loss == SoftmaxSettings(tile_rows=7, same_group="negative") and softmax.optim.max_scale == 100
    sigmoid = decide(new, siglip)[0]
    assert sigmoid.loss == SigmoidSettings(tile_rows=7, same_group="negative") and sigmoid.optim.max_scale is None
    asked = recipe({"path": "clip"}, loss={"name": "sigmoid"})
    decided, told = decide(asked, clip)
    assert isinstance(decided.loss, SigmoidSettings) and "set model.bias=-10" in told[1]
    assert not any("bias" in line for line in decide(asked, siglip)[1])


def survey(copies: dict[int, int], cut: float | None = 0.0) -> CaptionSurvey:
    return CaptionSurvey(sum(k * number for k, number in copies.items()), copies, cut, longest=100)


@pytest.mark.parametrize(
    ("loss", "copies", "decided"),
    [
        ({}, {100: 100}, "positive"),
        ({}, {1: 10_000}, "negative"),
        ({}, {1: 9_990, 10: 1}, "negative"),
        ({"name": "triplet"}, {100: 100}, "mask"),
        ({"name": "global"}, {100: 100}, "mask"),
        ({"same_group": "negative"}, {100: 100}, "negative"),
        ({"same_group": "mask"}, {1: 10_000}, "mask"),
    ],
)
def test_captions_that_repeat_are_no_negatives(loss: dict[str, Any], copies: dict[int, int], decided: str) -> None:
    found, told = decide(recipe({"path": "clip"}, loss=loss), tiny_model(), survey(copies))
    assert found.loss.same_group == decided  # type: ignore[union-attr]
    line = [one for one in told if one.startswith("captions: ")]
    assert bool(line) is (100 in copies or decided == "mask")
    if 100 in copies:
        assert "71.7% of a batch of 128" in line[0] and "loss.same_group" in line[0]


def test_captions_that_are_cut_are_told_with_the_key() -> None:
    told = decide(recipe({"path": "clip"}), tiny_model(), survey({1: 1000}, cut=0.25))[1]
    assert told[1].startswith("captions: 25.0% have more tokens than model.num_tokens") and "has 100" in told[1]


def test_the_share_of_repeated_captions_is_what_batches_show() -> None:
    dice = np.random.default_rng(0)
    names = dice.integers(0, 30, 3000)
    counts = np.bincount(np.bincount(names, minlength=30))
    found = survey({k: int(number) for k, number in enumerate(counts) if k and number})
    shares = []
    for _ in range(300):
        drawn = dice.choice(names, 16, replace=False)
        shares.append(np.mean([np.sum(drawn == name) > 1 for name in drawn]))
    assert abs(found.repeated(16) - np.mean(shares)) < 0.02
    assert survey({1: 1}).repeated(16) == 0
