"""Every loss from a recipe's section: the union by name, its keys, and what its mistakes say."""

import pytest
import torch

from tests.support import dense_losses
from trainer.core.settings import Settings, parse, warn_renamed
from trainer.core.types import UserError
from trainer.losses import (
    LOSSES,
    GlobalLoss,
    LossSettings,
    QueueLoss,
    SigmoidLoss,
    SigmoidSettings,
    SinkhornLoss,
    SoftmaxLoss,
    TripletLoss,
    TripletSettings,
    build,
)
from trainer.step import BatchSettings


class Recipe(Settings):
    loss: LossSettings


RECIPES = [
    ({"name": "sigmoid"}, SigmoidLoss),
    (
        {"name": "sigmoid", "tile_rows": 64, "exchange": "hierarchical", "node_size": 2, "comm_dtype": "bfloat16"},
        SigmoidLoss,
    ),
    ({"name": "sigmoid", "negatives": {"keep": "hardest", "ratio": 2}}, SigmoidLoss),
    ({"name": "sigmoid", "negatives": {"keep": "random", "warmup": 0.1}}, SigmoidLoss),
    ({"name": "sigmoid", "negatives": {"weight": 0.1}, "same_group": "mask"}, SigmoidLoss),
    ({"name": "softmax", "label_smoothing": 0.1}, SoftmaxLoss),
    ({"name": "softmax", "same_group": "positive"}, SoftmaxLoss),
    ({"name": "global", "temperature": "fixed", "gamma": 0.5}, GlobalLoss),
    ({"name": "queue", "width": 32, "size": 16}, QueueLoss),
    ({"name": "sinkhorn", "mix": 0.3}, SinkhornLoss),
    ({"name": "triplet", "margin": 0.1}, TripletLoss),
]


@pytest.mark.parametrize(("section", "kind"), RECIPES)
def test_a_recipes_section_makes_a_loss_that_trains(section, kind):
    loss = build(parse(Recipe, {"loss": section}, "recipe.yaml").loss)
    assert type(loss) is kind
    loss.progress(10, 100)
    z = dense_losses.take(dense_losses.batch(9, near=0.35)._replace(ids=torch.arange(9)), [9], 0)
    loss(z).backward()
    assert z.image.grad.norm() > 0 and z.text.grad.norm() > 0
    assert all(leaf.grad.shape == leaf.shape for leaf in z[:4])
    assert not list(loss.parameters())


def test_a_section_without_a_name_is_of_the_default_kind():
    class Defaulting(Settings):
        loss: LossSettings = SigmoidSettings()

    assert parse(Defaulting, {"loss": {"comm_dtype": "bfloat16"}}, "recipe.yaml").loss == SigmoidSettings(
        comm_dtype="bfloat16"
    )
    assert parse(Defaulting, {"loss": {"name": "triplet"}}, "recipe.yaml").loss == TripletSettings()
    with pytest.raises(UserError, match=r"'loss.name' is required"):
        parse(Recipe, {"loss": {"comm_dtype": "bfloat16"}}, "recipe.yaml")


def test_every_loss_is_in_a_recipe_here():
    assert {kind for _, kind in RECIPES} == set(LOSSES.values())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "sigmod"}, "did you mean 'sigmoid'"),
        ({"name": "sigmoid", "row": 4}, "did you mean 'tile_rows'"),
        ({"name": "sigmoid", "negatives": {"ratios": 4}}, "did you mean 'ratio'"),
        ({"name": "queue"}, "'loss.width' is required"),
        ({"name": "sigmoid", "negatives": {"ratio": 0.5, "warmup": 0.1}}, "warmup grows the ratio from 1"),
        ({"name": "triplet", "same_group": "positive"}, "same_group"),
    ],
)
def test_mistakes_name_the_key(section, message):
    with pytest.raises(UserError, match=message):
        parse(Recipe, {"loss": section}, "recipe.yaml")


def test_old_names_of_keys_still_work_and_name_the_new_one(capfd: pytest.CaptureFixture[str]) -> None:
    class Defaulting(Settings):
        loss: LossSettings = SigmoidSettings()

    warn_renamed.cache_clear()
    assert parse(Defaulting, {"loss": {"rows": 64, "wire": "bfloat16"}}, "r.yaml").loss == SigmoidSettings(
        tile_rows=64, comm_dtype="bfloat16"
    )
    assert BatchSettings.model_validate({"size": 8, "reduce": "each"}).grad_reduction == "per_micro_batch"
    told = capfd.readouterr().err
    for line in ("rows is now called tile_rows", "wire is now called", "grad_reduction: each is now called per_micro"):
        assert line in told
    with pytest.raises(UserError, match=r"unknown key 'loss\.rows'"):  # both names: which is meant?
        parse(Defaulting, {"loss": {"rows": 64, "tile_rows": 32}}, "r.yaml")
