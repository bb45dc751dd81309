"""What a recipe leaves open (`auto`), decided from what is trained and from the captions: the rate of each part, the
loss, the ceiling of the temperature, and what captions that repeat in a batch are to each other.

    recipe, decisions = decide(recipe, model, survey)       # no `auto` left; a line for each decision worth telling

A run begins with this, and what was decided stands in its recipe.yaml.
"""

from __future__ import annotations

from typing import Any, Literal

from trainer.config import Recipe
from trainer.core.collectives import on_main
from trainer.data.captions import CaptionSurvey, survey_captions
from trainer.losses import AutoSettings, LossSettings, SigmoidSettings, SoftmaxSettings
from trainer.losses.base import PairSettings
from trainer.models import DualEncoder, ModelSettings
from trainer.optim import NEW_RATE, OptimizerSettings

Kind = Literal["new", "pretrained", "lora"]
Part = Literal["image", "text", "projection", "positions", "head"]
RATES: dict[Kind, float] = {"new": NEW_RATE, "pretrained": 1e-5, "lora": 2e-4}
"""Peak rates of AdamW. New towers: SigLIP (arXiv 2303.15343) trains at 1e-3. Whole pretrained towers: 1e-5 (FLYP, arXiv
2212.00638, sweeps 1e-4 to 1e-6). LoRA: 2e-4 (CLIP-LoRA, arXiv 2405.18541)."""
WORDS: dict[Kind, str] = {"new": "new weights", "pretrained": "whole pretrained towers", "lora": "LoRA"}
FAR = 10.0
"""A recipe's own rate is worth a warning from this many times the usual one, at batches up to 1,024; the square root of
the batch allows more."""
REPEATED = 0.05
"""Share of a batch's pairs with an equal caption from which `same_group: auto` no longer takes them for negatives: the
fused kernel for plain negatives is faster, and fewer false negatives cost little."""
NEW_CLIP_CEILING = 100.0
"""The ceiling of t that CLIP trained with (arXiv 2103.00020, section 2.5)."""


def look_at_captions(recipe: Recipe, model: DualEncoder) -> CaptionSurvey | None:
    """Rank 0 reads some thousand training captions, all ranks know what they are like."""

    def look() -> dict[str, Any]:
        survey = survey_captions(recipe.data, model.preprocess) if recipe.data.train else None
        return survey.as_json() if survey is not None else {}

    found = on_main(look)
    return CaptionSurvey.from_json(found) if found else None


def kinds(model: ModelSettings) -> dict[Part, Kind]:
    """What each part that is trained is."""
    found: dict[Part, Kind] = {}
    for part in ("image", "text"):
        tower, locked = getattr(model, part), getattr(model.lock, part) and not getattr(model.lock, f"{part}_layers")
        pretrained = model.path is not None or (tower is not None and tower.path is not None)
        if model.lora is not None:
            if model.lora.towers in ("both", part):
                found[part] = "lora"
        elif not locked:
            found[part] = "pretrained" if pretrained else "new"
    if model.image is not None and (model.lora is None or model.lora.modules_to_save):
        found["projection"] = "new"
    if model.lora is not None and model.num_tokens is not None:
        found["positions"] = "pretrained"
    if not model.lock.scale:
        towers = [found[part] for part in ("image", "text") if part in found]
        new = model.path is None or not towers
        found["head"] = "new" if new else max(towers, key=RATES.__getitem__)
    return found


def decide(recipe: Recipe, model: DualEncoder, survey: CaptionSurvey | None = None) -> tuple[Recipe, list[str]]:
    """The recipe without `auto`, and what to tell of it: the rates first. ``survey`` is of the training captions;
    without it `same_group: auto` is negative."""
    rated, told = _rates(recipe, model)
    loss, about_loss = _loss(rated.loss, model)
    if about_loss:
        told.append(about_loss)
    group, about_captions = _same_group(loss, recipe.batch.size, survey)
    told += about_captions
    if getattr(loss, "same_group", None) == "auto":
        loss = loss.model_copy(update={"same_group": group})
    optim = rated.optim
    if optim.max_scale == "auto":
        ceiling = NEW_CLIP_CEILING if loss.normalises else None
        optim = optim.model_copy(update={"max_scale": ceiling})
    return rated.model_copy(update={"loss": loss, "optim": optim}), told


def _rates(recipe: Recipe, model: DualEncoder) -> tuple[Recipe, list[str]]:
    """optim.lr and model.rates as numbers."""
    parts, factors, optim = kinds(recipe.model), recipe.model.rates, recipe.optim
    if "positions" in parts and not model.trains_positions:
        del parts["positions"]
    usual = {part: RATES[kind] * optim.rate_of_adamw for part, kind in parts.items()}
    if optim.lr != "auto":
        told = [f"rate {optim.lr:g}"]
        warning = _far_out(optim, recipe, parts)
        return recipe, told + ([warning] if warning else [])
    peak = max(usual.values(), default=NEW_RATE * optim.rate_of_adamw)
    wanted: dict[str, float] = {part: getattr(factors, part) * rate / peak for part, rate in usual.items()}
    section = recipe.model.model_copy(update={"rates": factors.model_copy(update=wanted)})
    by_kind = dict.fromkeys(kind for part, kind in parts.items() if part != "head")
    listed = (
        ", ".join(f"{RATES[kind] * optim.rate_of_adamw:g} for {WORDS[kind]}" for kind in by_kind)
        or f"{peak:g} for temperature and bias"
    )
    decided = recipe.model_copy(update={"model": section, "optim": optim.model_copy(update={"lr": peak})})
    return decided, [f"rate {listed} (optim.lr auto)"]


def _far_out(optim: OptimizerSettings, recipe: Recipe, parts: dict[Part, Kind]) -> str | None:
    """A warning where the recipe's rate is far from what is usual for a part."""
    allowed = FAR * max(1.0, recipe.batch.size / 1024) ** 0.5
    for part in ("image", "text"):
        if part not in parts:
            continue
        usual, rate = RATES[parts[part]] * optim.rate_of_adamw, optim.peak * getattr(recipe.model.rates, part)
        if rate > allowed * usual * (1 + 1e-9):
            what = "they forget what they know" if parts[part] == "pretrained" else "training is likely to diverge"
            return (
                f"warning: the {part} tower learns at {rate:g}, {rate / usual:.0f} times what {WORDS[parts[part]]} "
                f"usually take ({usual:g}): {what}; leave optim.lr out, or lower it"
            )
        if rate < usual / (10 * FAR):
            return (
                f"warning: the {part} tower learns at {rate:g}, {usual / rate:.0f} times less than "
                f"{WORDS[parts[part]]} usually do ({usual:g}): little will be learnt; leave optim.lr out, or raise it"
            )
    return None


def _loss(loss: LossSettings, model: DualEncoder) -> tuple[LossSettings, str]:
    """The loss that the model was made for, where the recipe names none."""
    no_bias = model.head.logit_bias is None
    if not isinstance(loss, AutoSettings):
        if isinstance(loss, SigmoidSettings) and no_bias:
            return loss, (
                "warning: loss.name sigmoid on a model without a bias, whose negatives then outweigh all else: set "
                "model.bias=-10, or loss.name=softmax"
            )
        return loss, ""
    shared = {key: getattr(loss, key) for key in (*PairSettings.model_fields, "same_group")}
    if no_bias:
        if "negatives" in loss.model_fields_set:
            return SigmoidSettings(
                **shared, negatives=loss.negatives
            ), "loss.name auto: sigmoid (loss.negatives is given)"
        return SoftmaxSettings(**shared), "loss.name auto: softmax, as the model has no bias"
    return SigmoidSettings(**shared, negatives=loss.negatives), ""


def _same_group(loss: LossSettings, batch: int, survey: CaptionSurvey | None) -> tuple[str, list[str]]:
    """What `auto` means for these captions, and what to tell of them."""
    told: list[str] = []
    if survey is None:
        return "negative", told
    if survey.cut:
        told.append(
            f"captions: {survey.cut:.1%} have more tokens than model.num_tokens and are cut (the longest of "
            f"{survey.looked_at:,} has {survey.longest}); raise model.num_tokens to read on"
        )
    share, asked = survey.repeated(batch), getattr(loss, "same_group", None)
    if asked is None:
        return "negative", told
    decided = "negative"
    if share >= REPEATED:
        decided = loss.repeats
    if share >= REPEATED or asked not in ("auto", "negative"):
        what = f"auto: {decided}" if asked == "auto" else str(asked)
        told.append(
            f"captions: {share:.1%} of a batch of {batch:,} have another pair's caption ({survey.distinct:,} different "
            f"among {survey.looked_at:,}); loss.same_group {what}"
        )
    return decided, told
