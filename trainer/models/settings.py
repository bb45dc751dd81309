"""The ``model:`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.core.settings import OPERATIONAL, Settings
from trainer.models.adapt.lock import LockSettings
from trainer.models.adapt.lora import LoraSettings
from trainer.models.adapt.mask import MaskSettings
from trainer.models.adapt.recompute import RecomputeSettings
from trainer.models.param_groups import RateSettings
from trainer.models.precomputed import PrecomputedSettings
from trainer.models.vision_text import TowerSettings


class ModelSettings(Settings):
    """Two towers: a pretrained model (``path``), a new one (``config``), or a pair of any two (``image`` and
    ``text``)."""

    renamed: ClassVar = {"stored": "precomputed"}

    path: str | None = None
    "Directory or hub name of a Hugging Face CLIP or SigLIP model; its weights, scale and bias are kept."
    config: dict[str, Any] | None = None
    """A new model instead: the fields of Hugging Face's config.json (model_type: siglip or clip, vision_config,
    text_config, ...)."""
    image: TowerSettings | None = None
    "Image tower of a tower pair (two separate models, joined by new projections): any Hugging Face vision model."
    text: TowerSettings | None = None
    "Text tower of a tower pair: any Hugging Face text model."
    embed_dim: int = Field(default=512, gt=0)
    "Width of the embeddings of a tower pair (model.image with model.text)."
    tokenizer: str | None = None
    """Directory or hub name of a tokenizer; needed with config, otherwise the one in path. The vocabulary size is taken
    from it."""
    token_bottleneck: int | None = Field(default=None, gt=0)
    """Width of the token embedding table of a new text tower, before a projection to the full width: for large
    vocabularies (mSigLIP). null: full width."""
    image_size: int | None = Field(default=None, gt=0)
    "Side of the square images in pixels; null: what the model says. Pretrained position embeddings are resampled."
    num_patches: int | None = Field(default=None, gt=0, lt=65536)
    """NaFlex models: maximum patches per image, which keeps its aspect ratio (SigLIP 2: 128 to 1024); null: that of
    the checkpoint's processor."""
    num_tokens: int | None = Field(default=None, gt=0)
    """Context length in tokens; null: the model's own. If it exceeds that of a pretrained CLIP or SigLIP, the text
    position embeddings are stretched (Long-CLIP, arXiv 2403.15378) and, beside an adapter, trained in full."""
    scale: float | None = Field(default=None, gt=0)
    """Initial t, the factor on cosine similarities; null: what path holds, 10 for a new SigLIP (arXiv 2303.15343),
    1/0.07 for a new CLIP."""
    bias: float | None = None
    """Initial b, added to the logits; null: what path holds, -10 for a new SigLIP, none for CLIP. A number gives a CLIP
    model a bias."""
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], OPERATIONAL] = "sdpa"
    "Attention implementation of transformers."

    recompute: Annotated[RecomputeSettings, OPERATIONAL] = RecomputeSettings()
    "Layers that trade time for activation memory."
    lock: LockSettings = LockSettings()
    "Weights that stay as they are."
    precomputed: PrecomputedSettings = PrecomputedSettings()
    "Stored embeddings of a locked tower instead of the tower (SigLiT)."
    lora: LoraSettings | None = None
    "A low-rank adapter instead of full finetuning; null: none."
    mask: MaskSettings = MaskSettings()
    "Patches (FLIP) and tokens (CLIPA) left out in training."
    rates: RateSettings = RateSettings()
    "Learning rates per tower and per layer, relative to optim.lr."

    @property
    def at_rest(self) -> ModelSettings:
        """The same model outside training: its adapter lies on the base as it is in ``path``, whatever training holds
        the base in."""
        return (
            self
            if self.lora is None
            else self.model_copy(update={"lora": self.lora.model_copy(update={"base": "float32"})})
        )

    @property
    def without_precomputed_tower(self) -> ModelSettings:
        """The same model with both towers run."""
        return self.model_copy(update={"precomputed": PrecomputedSettings()})

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        pair = self.image is not None and self.text is not None
        if (self.image is None) != (self.text is None):
            raise ValueError("a pair needs both model.image and model.text")
        if (self.path is not None) + (self.config is not None) + pair != 1:
            raise ValueError(
                "give one of model.path (a pretrained model), model.config (a new one), model.image with model.text "
                "(a pair)"
            )
        new_text = self.config is not None or (self.text is not None and self.text.path is None)
        if new_text and self.tokenizer is None:
            raise ValueError(
                "a new text tower needs model.tokenizer: `python -m data_tools vocabulary SHARDS OUT` makes one"
            )
        if self.token_bottleneck and (not new_text or self.lora is not None):
            raise ValueError("token_bottleneck is for a new text tower that is trained whole: leave it out")
        if self.lora is not None and any(
            locked and self.lora.towers in ("both", tower)
            for tower, locked in (("image", self.lock.image), ("text", self.lock.text))
        ):
            raise ValueError(
                "a locked tower cannot learn an adapter: name the other one in model.lora.towers, or take model.lock "
                "out"
            )
        self._check_stored()
        return self

    def _check_stored(self) -> None:
        side = self.precomputed.side
        if side is None:
            return
        locked, layers = getattr(self.lock, side), getattr(self.lock, f"{side}_layers")
        if not locked or layers:
            raise ValueError(
                f"precomputed.{side}: only a tower that never changes can be stored: model.lock.{side}=true, no "
                f"{side}_layers"
            )
        pretrained = self.path is not None or (getattr(self, side) is not None and getattr(self, side).path is not None)
        if not pretrained:
            raise ValueError(
                f"precomputed.{side}: the tower has random weights; a stored one comes from model.path or "
                f"model.{side}.path"
            )
        if side == "image" and self.mask.drop:
            raise ValueError(
                "precomputed.image: patches cannot be dropped from images that are not read; remove model.mask.drop"
            )
        if side == "text" and self.mask.tokens:
            raise ValueError(
                "precomputed.text: captions that are not read cannot be shortened; remove model.mask.tokens"
            )
