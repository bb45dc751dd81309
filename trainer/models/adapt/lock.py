"""Locked towers: LiT (arXiv 2111.07991) locks the image tower and lets the text tower learn to read it."""

from __future__ import annotations

from pydantic import Field
from transformers import PreTrainedModel

from trainer.core.settings import Settings
from trainer.core.types import UserError
from trainer.models.param_groups import Tower, depth_of, num_layers, tower_of
from trainer.models.vision_text import PAIR


class LockSettings(Settings):
    """Parts that keep their weights. A locked tower needs no backward pass, gradients or optimizer state."""

    image: bool = False
    "Lock the image tower (LiT); the projection of a tower pair is new and is still trained."
    image_layers: int = Field(default=0, ge=0)
    """Number of last layers of a locked image tower that are trained nevertheless, with its final norm, pooling head
    and projection; 0: none."""
    text: bool = False
    "Lock the text tower."
    text_layers: int = Field(default=0, ge=0)
    """Number of last layers of a locked text tower that are trained nevertheless, with its final norm and projection;
    0: none."""
    scale: bool = False
    "Lock the scale and the bias."


def lock_towers(towers: PreTrainedModel, settings: LockSettings) -> None:
    """Clears ``requires_grad`` on the locked parameters."""
    if settings.image:
        _lock(towers, "image", settings.image_layers)
    if settings.text:
        _lock(towers, "text", settings.text_layers)


def _lock(towers: PreTrainedModel, tower: Tower, last: int) -> None:
    layers = num_layers(towers, tower)
    if last > layers:
        raise UserError(
            f"model.lock.{tower}_layers is {last}, the {tower} tower has {layers} layers: leave model.lock.{tower} "
            f"out instead"
        )
    for name, parameter in towers.named_parameters():
        if towers.config.model_type == PAIR and "_projection." in name:
            continue  # new: useless without training
        if tower_of(name) == tower and (last == 0 or depth_of(name, layers) <= layers - last):
            parameter.requires_grad_(False)
