"""Assigns parameters to towers and layers, for locking, LoRA and learning rates per layer."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from trainer.core.settings import Settings

Tower = Literal["image", "text"]
PREFIXES: dict[str, tuple[str, ...]] = {
    "image": ("vision_model.", "visual_projection."),
    "text": ("text_model.", "text_projection."),
}
_LAYER = re.compile(r"\.layers?\.(\d+)\.")
_FIRST = re.compile(r"\.(embeddings|pre_layrnorm)\.")


class RateSettings(Settings):
    """Learning rates relative to ``optim.lr``."""

    image: float = Field(default=1.0, gt=0)
    "Factor on the rate of the image tower."
    text: float = Field(default=1.0, gt=0)
    "Factor on the rate of the text tower."
    projection: float = Field(default=1.0, gt=0)
    "Factor on the rate of a tower pair's projections, which are new even if its towers are pretrained."
    positions: float = Field(default=1.0, gt=0)
    "Factor on the rate of text position embeddings that are trained in full beside a LoRA adapter (model.num_tokens)."
    head: float = Field(default=1.0, gt=0)
    """Factor on the rate of the scale and the bias; above 1 for short runs, in which they would barely change."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor per layer from the last to the first, in both towers (BEiT, arXiv 2106.08254): 1 is off, 0.65 to 0.9 usual
    when finetuning."""


class ParameterGroup(NamedTuple):
    """Trainable parameters that share a rate and whether they are decayed."""

    names: list[str]
    """As ``DualEncoder.named_parameters()`` has them."""
    rate: float
    """Factor on the learning rate."""
    decay: bool
    """False for vectors (norms, biases), the temperature and the bias."""


def tower_of(name: str) -> Tower | None:
    """The tower of a parameter or module, by its name in the Hugging Face model or in the DualEncoder; None if it
    belongs to neither."""
    name = name.removeprefix("towers.") + "."
    if name.startswith(PREFIXES["image"]):
        return "image"
    return "text" if name.startswith(PREFIXES["text"]) else None


def in_layer(name: str) -> bool:
    """Whether a parameter or module is inside one of a tower's transformer layers."""
    return _LAYER.search(name + ".") is not None


def num_layers(towers: PreTrainedModel, tower: Tower) -> int:
    """Transformer layers of one tower."""
    found = [
        int(match[1])
        for name, _ in towers.named_modules()
        if tower_of(name) == tower and (match := _LAYER.search(name + "."))
    ]
    return max(found, default=-1) + 1


def depth_of(name: str, layers: int) -> int:
    """0 for the embeddings, 1 to ``layers`` for the layers, ``layers + 1`` for the norm, pooling and projection after
    them."""
    match = _LAYER.search(name)
    if match:
        return int(match[1]) + 1
    return 0 if _FIRST.search(name) else layers + 1


def parameter_groups(
    model: nn.Module, towers: PreTrainedModel, rates: RateSettings, pair: bool = False, adapter: bool = False
) -> list[ParameterGroup]:
    """The trainable parameters of ``model`` by rate and decay, in the order in which they are first met. Of a ``pair``
    the projections, beside an ``adapter`` the position embeddings have rates of their own."""
    layers: dict[Tower, int] = {"image": num_layers(towers, "image"), "text": num_layers(towers, "text")}
    groups: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = tower_of(name)
        rate = rates.head
        if tower is not None:
            above = layers[tower] + 1 - depth_of(name, layers[tower])
            rate = (rates.image if tower == "image" else rates.text) * rates.layer_decay**above
            if pair and "_projection." in name:
                rate = rates.projection
            elif adapter and "position_embedding" in name:
                rate = rates.positions
        # Under ZeRO-3 a partitioned parameter is empty; DeepSpeed stores its shape in an attribute.
        groups.setdefault((rate, len(getattr(parameter, "ds_shape", parameter.shape)) > 1), []).append(name)
    return [ParameterGroup(names, rate, decay) for (rate, decay), names in groups.items()]
