"""Recomputation (activation checkpointing): a layer keeps only its input in the forward pass and is run again in the
backward pass (Chen et al., arXiv 1604.06174).

    model:
      # Every layer of the image tower, every second one of the text tower.
      recompute: {image: all, text: 2, offload: true}

At large micro-batches the encoders' activations fill the memory, not the loss. Gradients are identical: dropout draws
again from the same random state. The cost is one more forward pass of the chosen layers.
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
    """Which layers discard their activations and recompute them in the backward pass."""

    image: Layers = "none"
    """Layers of the image tower: none, all, or k for every k-th. Each chosen layer keeps one activation instead of
    about fifteen."""
    text: Layers = "none"
    "The same for the text tower."
    offload: bool = False
    "Keep the inputs of the chosen layers in pinned host memory until the backward pass."

    @field_validator("image", "text")
    @classmethod
    def _from_one(cls, value: Layers) -> Layers:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{value} is not possible: give none, all, or k >= 1 for every k-th layer")
        return value


def recompute(tower: nn.Module, layers: Layers, offload: bool = False) -> int:
    """Wraps the chosen layers of ``tower`` in place, parameter names unchanged; returns how many there are.

    ``layers`` k > 1 skips k - 1 of k layers, beginning with the first.
    Raises UserError for a tower without a list of layers, or of fewer.
    """
    assert layers in ("none", "all") or int(layers) > 0
    if layers == "none":
        return 0
    step = 1 if layers == "all" else int(layers)
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise UserError(f"model.recompute: {type(tower).__name__} has no list of layers to recompute; set it to none")
    longest = max(stacks, key=lambda stack: len(stack))
    if step > len(longest):
        raise UserError(
            f"model.recompute: {type(tower).__name__} has only {len(longest)} layers, so there is no {step}-th: lower "
            "the "
            f"number"
        )
    chosen = list(longest)[step - 1 :: step]
    for layer in chosen:
        layer.forward = Recomputed(layer.forward, offload)
    return len(chosen)


class Recomputed:
    """A layer's ``forward`` that keeps only its inputs and runs again in the backward pass."""

    def __init__(self, forward: Callable[..., Any], offload: bool) -> None:
        self.forward, self.offload = forward, offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)  # pass 1 of a step, evaluation
        with _storage(self.offload):
            # Not reentrant: works without a gradient at the input (below locked layers), and keeps autocast as it was.
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def _storage(offload: bool) -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext()
