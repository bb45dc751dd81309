"""Any Hugging Face vision model with any text model: two towers that never met, joined by new projections (LiT, arXiv
2111.07991).

    model:
      image: {path: google/vit-base-patch16-224}
      text: {path: google-bert/bert-base-uncased}
      lock: {image: true}

The result is transformers' VisionTextDualEncoderModel, so AutoModel loads what is exported.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from trainer.core.settings import Settings
from trainer.core.types import UserError
from trainer.models.hf_errors import making, reading
from trainer.models.param_groups import Tower
from trainer.models.pooling import Pooling, choose_pooling

PAIR = "vision-text-dual-encoder"


class TowerSettings(Settings):
    """One tower of a pair: pretrained, or new."""

    path: str | None = None
    """Directory or hub name of a Hugging Face model (ViT, DINOv2, ConvNeXt, BERT, MiniLM, ...), or of a CLIP or SigLIP:
    its tower."""
    config: dict[str, Any] | None = None
    """A new tower instead: model_type (vit, bert, clip_text_model, ...) and its other fields in Hugging Face's
    config.json."""
    pooling: Pooling | Literal["auto"] = "auto"
    """How its output becomes one vector: pooler (the model's own pooled output), cls (first token), mean (of patches,
    or of the tokens that are not padding), last (token). auto: as a sentence-transformers checkpoint says, else pooler
    where the checkpoint has one."""

    @model_validator(mode="after")
    def _one_source(self) -> TowerSettings:
        if (self.path is None) == (self.config is None):
            raise ValueError("a tower has either path (pretrained) or config (new)")
        return self


def tower_config(settings: TowerSettings, key: str, part: str) -> PretrainedConfig:
    """The config of one tower; ``part`` (vision_config, text_config) is taken where ``path`` holds both. Raises
    UserError."""
    if settings.config is not None:
        tree = dict(settings.config)
        if "model_type" not in tree:
            raise UserError(f"{key}.config.model_type is required: it says which Hugging Face model the tower is")
        try:
            return AutoConfig.for_model(**tree)
        except ValueError as error:
            raise UserError(f"{key}.config: {str(error).splitlines()[0]}") from error
    assert settings.path is not None
    with reading(f"{key}.path", settings.path, "its config"):
        config = AutoConfig.from_pretrained(settings.path, trust_remote_code=False)
    return getattr(config, part, config)


def pair_config(
    image: TowerSettings, vision: PretrainedConfig, caption: TowerSettings, text: PretrainedConfig, embed_dim: int
) -> PretrainedConfig:
    """The config of the two together, with their pooling where it is not transformers' own. Raises UserError for a
    vision model whose width it does not tell, or that pools to maps."""
    if vision.model_type in ("resnet", "regnet"):
        raise UserError(
            f"model.image: {vision.model_type} pools to [b, d, 1, 1], which transformers' VisionTextDualEncoderModel "
            "cannot read: take efficientnet or convnext"
        )
    if not hasattr(
        vision, "hidden_size"
    ):  # convolutional models call it otherwise; VisionTextDualEncoderModel knows this name alone
        stages = getattr(vision, "hidden_sizes", None)
        width = getattr(vision, "hidden_dim", None) or (stages[-1] if stages else None)
        if width is None:
            raise UserError(
                f"model.image: the config of {vision.model_type!r} has neither hidden_size, hidden_dim nor hidden_sizes"
            )
        vision.hidden_size = width
    config = VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=embed_dim
    )
    pooling = {}
    sides: tuple[tuple[Tower, TowerSettings, PretrainedConfig], ...] = (
        ("image", image, vision),
        ("text", caption, text),
    )
    for key, settings, part in sides:
        with making(f"model.{key}"):
            pooling[key] = choose_pooling(settings.pooling, settings.path, part, key)
    if set(pooling.values()) != {"pooler"}:
        config.pooling = pooling  # transformers knows no such key and keeps it
    return config


def join(
    config: PretrainedConfig, image: TowerSettings, text: TowerSettings, options: dict[str, Any]
) -> PreTrainedModel:
    """The pair with pretrained weights where a tower has a path, and new projections."""
    vision_model = _tower(image, config.vision_config, "vision_model", options)
    text_model = _tower(text, config.text_config, "text_model", options)
    assert isinstance(config, VisionTextDualEncoderConfig)
    return VisionTextDualEncoderModel(config=config, vision_model=vision_model, text_model=text_model).float()


def attention_of(config: PretrainedConfig, wanted: str) -> str:
    """``wanted``, or eager for a tower that has no attention to choose (convolutional ones)."""
    cls: Any = MODEL_MAPPING.get(type(config), None)
    return wanted if cls is None or cls._supports_sdpa else "eager"


def _tower(settings: TowerSettings, config: PretrainedConfig, part: str, options: dict[str, Any]) -> PreTrainedModel:
    options = options | {"attn_implementation": attention_of(config, options["attn_implementation"])}
    if settings.path is None:
        with making("model.image.config" if part == "vision_model" else "model.text.config"):
            return AutoModel.from_config(config, **options)
    with reading("model.image.path" if part == "vision_model" else "model.text.path", settings.path, "its weights"):
        model = AutoModel.from_pretrained(settings.path, trust_remote_code=False, **options)
    return getattr(model, part, model)
