"""Hugging Face's two-tower models, from a config or a checkpoint, made consistent with their tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from trainer.core.types import UserError
from trainer.models import open_clip
from trainer.models.adapt.positions import check_num_tokens, resize_images, stretch_texts
from trainer.models.hf_errors import making, reading
from trainer.models.naflex import NAFLEX
from trainer.models.pooling import drop_unused_poolers
from trainer.models.settings import ModelSettings
from trainer.models.vision_text import PAIR, TowerSettings, attention_of, join, pair_config, tower_config

FAMILIES = ("siglip", "clip", NAFLEX, PAIR)
"""``model_type`` of the models that are trained here."""

NEW_SCALE = {"siglip": 10.0, "clip": 1 / 0.07, NAFLEX: 10.0, PAIR: 10.0}
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "num_patches", "vocab_size", "max_position_embeddings", "projection_dim", "projection_size",
)  # fmt: skip
"""Keys of a config that transformers takes unseen, to fail far away or not at all."""
NEW_BIAS = {"siglip": -10.0, NAFLEX: -10.0, PAIR: -10.0}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and its warnings about the default configs that it makes to compare ours
    with: SigLIP's own defaults have ids 49406 and 49407 with a vocabulary of 32000, so any SigLIP model warns
    (transformers#47612).
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def make_config(settings: ModelSettings, tokenizer: Any) -> PretrainedConfig:
    """The model's Hugging Face config with the recipe's sizes and the tokenizer's vocabulary laid in."""
    if settings.path:
        config = read_config(settings.path)
    elif settings.config is not None:
        config = _new_config(settings.config, tokenizer)
    else:
        config = _new_pair(settings, tokenizer)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model type {config.model_type!r} is not a two-tower model known here; known: {', '.join(FAMILIES)}"
        )
    if config.model_type == NAFLEX and settings.image_size:
        raise UserError(
            "model.image_size is for square images, a NaFlex model keeps their aspect: set model.num_patches instead"
        )
    if config.model_type != NAFLEX and settings.num_patches:
        raise UserError(
            f"model.num_patches is for NaFlex models, this one is {config.model_type!r}: set model.image_size instead"
        )
    check_num_tokens(config, settings)
    check_tokenizer(config, tokenizer, settings)
    return config


def read_config(path: str) -> PretrainedConfig:
    """That of the model at ``path``."""
    if open_clip.is_open_clip(path):
        return open_clip.read_config(path)
    with reading("model.path", path, "its config"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _new_pair(settings: ModelSettings, tokenizer: Any) -> PretrainedConfig:
    assert settings.image is not None
    assert settings.text is not None
    text = settings.text
    if text.config is not None:
        text = TowerSettings(config=_fill_text(dict(text.config), tokenizer))
    for key, tower in (("image", settings.image), ("text", text)):
        if tower.config is not None and tower.config.get("model_type") in CONFIG_MAPPING:
            _check_keys(CONFIG_MAPPING[tower.config["model_type"]], tower.config, f"model.{key}.config")
    vision = tower_config(settings.image, "model.image", "vision_config")
    if settings.image_size and settings.image_size != vision.image_size:
        raise UserError(
            f"model.image_size is {settings.image_size}, the image tower of the pair is made for "
            f"{vision.image_size}: leave it out"
        )
    return pair_config(
        settings.image, vision, text, tower_config(text, "model.text", "text_config"), settings.embed_dim
    )


def _new_config(tree: dict[str, Any], tokenizer: Any) -> PretrainedConfig:
    tree = dict(tree)
    family = tree.pop("model_type", "siglip")
    if family not in FAMILIES:
        raise UserError(f"model.config.model_type is {family!r}, known: {', '.join(FAMILIES)}")
    cls: Any = CONFIG_MAPPING[family]
    _check_keys(cls, tree, "model.config")
    for part, part_cls in cls.sub_configs.items():
        tree[part] = dict(tree.get(part) or {})
        _check_keys(part_cls, tree[part], f"model.config.{part}")
    _fill_text(tree["text_config"], tokenizer)
    try:
        return cls(**tree)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"model.config: {reason.removeprefix('ValueError: ')}") from error


def _fill_text(text: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    text.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        text.setdefault(name, getattr(tokenizer, name))
    return text


def _check_keys(cls: type[PretrainedConfig], tree: dict[str, Any], where: str) -> None:
    # Hugging Face keeps unknown config keys as attributes that nothing reads: a typing mistake would train another
    # model.
    known = {field.name for field in dataclasses.fields(cls)} | {"model_type"}
    for key in tree:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"
            raise UserError(f"unknown key '{where}.{key}'; {hint}")
        if key in SIZES and not isinstance(tree[key], list) and (type(tree[key]) is not int or tree[key] < 1):
            raise UserError(f"'{where}.{key}' is {tree[key]!r}: a whole number from 1 is needed")
    side, patch = tree.get("image_size", 0), tree.get("patch_size", 0)
    if isinstance(side, int) and isinstance(patch, int) and 0 < side < patch:
        raise UserError(
            f"'{where}.image_size' {side} is less than one patch ({patch}): raise it, or lower '{where}.patch_size'"
        )


def check_tokenizer(config: PretrainedConfig, tokenizer: Any, settings: ModelSettings) -> None:
    """Raises UserError when the text tower cannot read what the tokenizer writes."""
    text, name = config.text_config, settings.tokenizer or settings.path or (settings.text and settings.text.path)
    largest = max(tokenizer.get_vocab().values())
    if largest >= text.vocab_size:
        raise UserError(
            f"tokenizer {name!r} has ids up to {largest}, the text tower has {text.vocab_size} embeddings: "
            "use the model's own tokenizer, or leave vocab_size out of model.config.text_config"
        )
    if settings.path and settings.tokenizer and _own_vocabulary(settings.path) not in (None, tokenizer.get_vocab()):
        raise UserError(
            f"model.tokenizer {name!r} differs from the one that model.path {settings.path!r} was trained with: "
            f"leave it out"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer {name!r} has no padding token: set pad_token in its tokenizer_config.json")
    if config.model_type == NAFLEX and type(tokenizer).__name__ != "Siglip2Tokenizer":
        raise UserError(
            f"tokenizer {name!r} is no Siglip2Tokenizer, which transformers reads for a siglip2 model: use "
            f"model_type siglip"
        )
    if config.model_type != "clip":
        return
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in tokenizer("a")["input_ids"]:
        raise UserError(
            f"tokenizer {name!r} adds no end token, where CLIP reads a caption's embedding: add one in its "
            f"post-processor"
        )
    if text.eos_token_id == 2 and tokenizer.eos_token_id != largest:
        raise UserError(
            f"tokenizer {name!r} ends captions with id 2, which transformers' CLIP takes for the sign of an old "
            f"config and then reads "
            "the embedding at the largest id instead: give the end token another id, or use model_type: siglip"
        )
    if settings.config is not None and text.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"model.config.text_config.eos_token_id is {text.eos_token_id}, the end token of {name!r} is "
            f"{tokenizer.eos_token_id}: omit it"
        )


def _own_vocabulary(path: str) -> dict[str, int] | None:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab()
    except (OSError, ValueError, ImportError):
        return None  # weights without a tokenizer: that is what model.tokenizer is for


def make_towers(config: PretrainedConfig, settings: ModelSettings, weights: bool) -> PreTrainedModel:
    """The Hugging Face model in float32: from ``settings.path`` when ``weights``, else randomly initialised from
    ``config``."""
    with quietly():
        towers = _read_towers(config, settings, weights)
    if config.model_type == PAIR:
        drop_unused_poolers(towers)
    if settings.image_size and config.model_type in ("siglip", "clip"):  # a pair takes only its own
        resize_images(towers, settings.image_size)
    if settings.num_tokens:
        stretch_texts(towers, settings.num_tokens, quiet=not weights)
    return towers


def _read_towers(config: PretrainedConfig, settings: ModelSettings, weights: bool) -> PreTrainedModel:
    options: Any = {"dtype": torch.float32, "attn_implementation": settings.attention}
    if weights and settings.image is not None and settings.text is not None:
        return join(config, settings.image, settings.text, options)
    if config.model_type == PAIR:
        options["attn_implementation"] = {
            part: attention_of(getattr(config, part), settings.attention) for part in ("vision_config", "text_config")
        }
    if not weights or settings.config is not None:
        with making("model.config" if settings.config is not None else settings.path or "model.image, model.text"):
            return AutoModel.from_config(config, **options)
    assert settings.path is not None
    if open_clip.is_open_clip(settings.path):
        return _of_open_clip(settings.path, config, options)
    with reading("model.path", settings.path, "its weights"):
        return AutoModel.from_pretrained(settings.path, trust_remote_code=False, **options)


def _of_open_clip(path: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    weights = open_clip.read_weights(path, config)
    towers = AutoModel.from_config(config, **options)
    if "logit_bias" in weights and config.model_type == "clip":
        config.logit_bias = float(weights.pop("logit_bias"))
    with reading("model.path", path, "its weights"):
        shapes = {name: value.shape for name, value in towers.state_dict().items()}
        weights = {
            name: value.reshape(shapes[name]) if value.numel() == 1 else value for name, value in weights.items()
        }
        towers.load_state_dict(weights)
    return towers


def take_scale_bias(towers: PreTrainedModel, settings: ModelSettings, pretrained: bool) -> tuple[float, float | None]:
    """Removes the temperature and bias from ``towers`` and returns t' (before the exponential) and b (None: a model
    without one).

    DeepSpeed cannot hold CLIP's 0-dimensional ``logit_scale``, and ZeRO-3 must see both inside a module with its own
    forward.
    """
    family = towers.config.model_type
    log_scale = _take(towers, "logit_scale")
    bias = _take(towers, "logit_bias")
    if not pretrained:
        log_scale, bias = math.log(NEW_SCALE[family]), NEW_BIAS.get(family)
    elif bias is None:
        bias = getattr(towers.config, "logit_bias", None)  # a CLIP model trained here with a bias
    if settings.scale is not None:
        log_scale = math.log(settings.scale)
    if settings.bias is not None:
        bias = settings.bias
    return log_scale, bias


def _take(towers: nn.Module, name: str) -> Any:
    parameter = getattr(towers, name, None)
    if parameter is None:
        return None
    delattr(towers, name)
    return 0.0 if parameter.is_meta else float(parameter.detach().reshape(()))
