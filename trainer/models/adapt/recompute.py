"""Recomputation: a layer keeps only its input in the forward pass and is run again in the backward pass (Chen et al.,
arXiv 1604.06174).

    model:
      # Every layer of the image tower, every second one of the text tower.
      recompute: {image: all, text: 2, offload: true}

Activations of the encoders are what fills memory at large micro-batches, not the loss. Gradients are the same numbers
either way: dropout draws again from the random state it had. One extra forward pass of the chosen layers is the price.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.core.settings import Settings
from trainer.core.types import UserError

Layers = Literal["none", "all"] | int


class RecomputeSettings(Settings):
    """Which layers forget their activations and compute them again when the gradient needs them."""

    image: Layers = "none"
    """Layers of the image tower: none, all, or k for every k-th. Each chosen layer keeps one activation instead of
    about fifteen."""
    text: Layers = "none"
    "The same for the text tower."
    offload: bool = False
    "Moves what chosen layers still keep (their inputs) to pinned host memory until the backward pass."

    @field_validator("image", "text")
    @classmethod
    def _from_one(cls, value: Layers) -> Layers:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"every {value}-th layer cannot be: give none, all, or a number from 1")
        return value


def recompute(tower: nn.Module, layers: Layers, offload: bool = False) -> int:
    """Wraps the chosen layers of ``tower`` in place, parameter names unchanged; returns how many there are.

    ``layers`` k > 1 leaves k - 1 of k layers as they are, beginning with the first.
    Raises UserError for a tower without a list of layers, or of fewer.
    """
    assert layers in ("none", "all") or int(layers) > 0
    if layers == "none":
        return 0
    step = 1 if layers == "all" else int(layers)
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise UserError(f"model.recompute: {type(tower).__name__} has no list of layers to recompute; leave it at none")
    longest = max(stacks, key=lambda stack: len(stack))
    if step > len(longest):
        raise UserError(
            f"model.recompute: {type(tower).__name__} has {len(longest)} layers, every {step}-th of them is none: "
            f"lower the number"
        )
    chosen = list(longest)[step - 1 :: step]
    for layer in chosen:
        _wrap(layer, offload)
    return len(chosen)


def _wrap(layer: nn.Module, offload: bool) -> None:
    forward: Callable[..., Any] = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # pass 1 of a step, evaluation
        with _storage(offload):
            # Not reentrant: works without a gradient at the input (below locked layers), and keeps autocast as it was.
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = recomputed


def _storage(offload: bool) -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext()
