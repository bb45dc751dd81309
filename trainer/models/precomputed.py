"""A locked tower with precomputed embeddings (SigLiT: arXiv 2303.15343, section 4.2): it is neither run nor in memory
while the other tower trains.

    model:
      image: {path: google/vit-base-patch16-224}
      text: {config: {model_type: bert, ...}}
      lock: {image: true}
      precomputed: {image: vit_b16}                 # the column that `python -m trainer.embed RECIPE` writes

Stored is the output of the locked weights: the normalised embedding of a CLIP or SigLIP, or the pooled output of a
pair's tower, whose projection is new and is trained.
"""

from __future__ import annotations

import json
import re
from typing import Any

import xxhash
from pydantic import field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.core.settings import Settings
from trainer.core.types import PrecomputedTower, Preprocess
from trainer.models.param_groups import Tower, tower_of
from trainer.models.pooling import embed_dim, pooling_of
from trainer.models.vision_text import PAIR

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
"""Keys of a Hugging Face config that do not change what the model computes."""
PROBE = ["", "a photo of a cat", "Ünïcode, 猫 & ПРИВЕТ: 0123456789 don't"]
"""Captions whose tokens, together with the vocabulary, identify a tokenizer."""
NAME = re.compile(r"(?!\.)[\w.-]+")
"""As in `python -m data_tools join`: it becomes a file name."""


class PrecomputedSettings(Settings):
    """Train on stored embeddings of a locked tower, which is not run and whose inputs are not decoded."""

    image: str | None = None
    """Column of image embeddings that `python -m trainer.embed` has written; needs model.lock.image. null: run the
    tower."""
    text: str | None = None
    "The same for the text tower; needs model.lock.text and one caption an image."

    @field_validator("image", "text")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} cannot name a column: letters, digits, _, - and . are known, and it does not begin with "
                f"a dot"
            )
        return value

    @model_validator(mode="after")
    def _one_side(self) -> PrecomputedSettings:
        if self.image is not None and self.text is not None:
            raise ValueError("only one tower can be precomputed, the other must be trained: name image or text")
        return self

    @property
    def side(self) -> Tower | None:
        """The tower that is stored."""
        return "image" if self.image is not None else "text" if self.text is not None else None

    @property
    def column(self) -> str:
        return self.image or self.text or ""


def locked_part(towers: PreTrainedModel, side: Tower, projected: bool = False) -> dict[str, Tensor]:
    """The weights and buffers that a stored embedding depends on, by their names in ``towers``; with ``projected``
    those of a pair's projection too."""
    outside = "_projection." if towers.config.model_type == PAIR and not projected else "\0"
    return {
        name: value for name, value in towers.state_dict().items() if tower_of(name) == side and outside not in name
    }


def fingerprint(towers: PreTrainedModel, preprocess: Preprocess, side: Tower, projected: bool = False) -> str:
    """32 hex digits that change with the tower's weights (``projected``: a pair's projection is one of them), its
    config and what is done to its inputs."""
    digest = xxhash.xxh3_128()
    part = getattr(towers.config, "vision_config" if side == "image" else "text_config")
    config = {key: value for key, value in part.to_diff_dict().items() if key not in VOLATILE}
    if (pooling := pooling_of(towers.config, side)) != "pooler":
        config["pooling"] = pooling
    if side == "image":
        inputs: Any = [preprocess.image_size, preprocess.resize, preprocess.resample, preprocess.mean, preprocess.std]
    else:
        inputs = token_inputs(preprocess)
    digest.update(json.dumps([side, towers.config.model_type, config, inputs], sort_keys=True, default=str).encode())
    for name, value in sorted(locked_part(towers, side, projected).items()):
        whole = value.detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(whole.shape)}".encode())
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


def token_inputs(preprocess: Preprocess) -> list[Any]:
    """Values that identify a tokenizer with its context length."""
    tokens, mask = preprocess.tokenize(PROBE)
    tokenizer = getattr(preprocess.tokenize, "tokenizer", None)
    return [tokens.tolist(), mask.tolist(), sorted(tokenizer.get_vocab().items()) if tokenizer else []]


def width_of(towers: PreTrainedModel, side: Tower) -> int:
    """Numbers in a stored embedding."""
    if towers.config.model_type != PAIR:
        return embed_dim(towers)
    projection: Any = towers.get_submodule("visual_projection" if side == "image" else "text_projection")
    return int(projection.in_features)


def precomputed_tower(
    towers: PreTrainedModel, preprocess: Preprocess, settings: PrecomputedSettings, weights: bool = True
) -> PrecomputedTower:
    """Describes the stored embeddings that a tower needs; without ``weights`` (for the planner) the fingerprint is
    empty."""
    assert settings.side is not None
    made_by = fingerprint(towers, preprocess, settings.side) if weights else ""
    return PrecomputedTower(settings.side, settings.column, made_by, width_of(towers, settings.side))


class PlaceholderTower(nn.Module):
    """Replaces a precomputed tower: has no weights and cannot be run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this tower's embeddings are precomputed: it cannot be run")


def remove_tower(towers: PreTrainedModel, side: Tower) -> None:
    """Removes a precomputed tower from the model, with its locked projection (a pair's is trained and stays)."""
    names = ["vision_model", "visual_projection"] if side == "image" else ["text_model", "text_projection"]
    for name in names[: 1 if towers.config.model_type == PAIR else 2]:
        if hasattr(towers, name):
            setattr(towers, name, PlaceholderTower())
