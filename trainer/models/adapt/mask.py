"""FLIP (arXiv 2212.00794): the image tower sees a random part of each image's patches, and a step costs that much
less.

CLIPA (arXiv 2305.07017) does the same to captions: the text tower sees a few of their tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.core.settings import Settings
from trainer.core.types import UserError


class MaskSettings(Settings):
    """Patches and tokens left out in training; evaluation always sees whole images and captions."""

    drop: float = Field(default=0.0, ge=0, lt=1)
    "Fraction of patches to drop, drawn for each image; FLIP: 0.5. 0 is off."
    tokens: int | None = Field(default=None, ge=2)
    "Maximum tokens of a caption, end token included; longer ones are shortened (CLIPA: 16 or 8). null: all."
    tokens_kept: Literal["first", "random", "block"] = "first"
    "Which tokens of a longer caption to keep, in order: the first, random ones, or a random contiguous block."
    unmasked: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the run, at its end, trained without dropping, which closes most of the gap to training unmasked."""


class PatchDrop:
    """A forward hook on the vision tower's embeddings that keeps a random subset of each image's patches, in order.

    It uses torch's default generator only, so that restoring the random state repeats the choice: the second pass of a
    step sees the same patches as the first.
    """

    def __init__(self, settings: MaskSettings, num_special: int) -> None:
        self.settings, self.num_special, self.active = settings, num_special, True

    def progress(self, samples_seen: int, total_samples: int) -> None:
        """Stops dropping when the last, unmasked part of the run begins."""
        self.active = samples_seen < (1 - self.settings.unmasked) * total_samples

    def __call__(self, module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        """[b, special + patches, d] -> [b, special + kept, d]."""
        if not (self.active and module.training):
            return hidden
        special, patches = hidden[:, : self.num_special], hidden[:, self.num_special :]
        rows, total, width = patches.shape
        kept = max(1, round(total * (1 - self.settings.drop)))
        order = torch.rand(rows, total, device=hidden.device).argsort(dim=1)[:, :kept].sort(dim=1).values
        return torch.cat([special, patches.gather(1, order[:, :, None].expand(rows, kept, width))], dim=1)


class TokenDrop:
    """Shortens captions in training. Like PatchDrop it uses torch's default generator only."""

    def __init__(self, settings: MaskSettings) -> None:
        self.settings, self.active = settings, True

    def progress(self, samples_seen: int, total_samples: int) -> None:
        """Stops shortening when the last, unmasked part of the run begins."""
        self.active = samples_seen < (1 - self.settings.unmasked) * total_samples

    def __call__(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [b, n] int64, mask [b, n] bool) -> [b, k] both.

        The first and the last real token are always kept (CLIP and BERT read a caption's embedding at special tokens
        there); kept tokens move together, to positions 0 to k - 1. A caption of k tokens or fewer keeps all of them.
        """
        assert self.settings.tokens is not None
        kept, (rows, total) = min(self.settings.tokens, tokens.shape[1]), tokens.shape
        lengths = mask.sum(dim=1, keepdim=True)
        places = torch.arange(total, device=tokens.device).expand(rows, total)
        # The smallest priorities are kept: first both ends, then the drawn tokens, then the others, then padding.
        match self.settings.tokens_kept:
            case "first":
                drawn = places / total
            case "random":
                drawn = torch.rand(rows, total, device=tokens.device)
            case "block":
                start = 1 + torch.rand(rows, 1, device=tokens.device) * (lengths - kept + 1).clamp(min=0)
                drawn = (places - start.floor()).where(places >= start.floor(), total + places) / (2 * total)
        ends = (places == 0) | (places == lengths - 1)
        priority = drawn.masked_fill(ends, -1.0).masked_fill(places >= lengths, 2.0)
        order = priority.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values
        return tokens.gather(1, order), mask.gather(1, order)


def drop_tokens(settings: MaskSettings, num_tokens: int) -> TokenDrop | None:
    """None without dropping. Raises UserError if captions are not longer than that."""
    if settings.tokens is None:
        return None
    if settings.tokens >= num_tokens:
        raise UserError(
            f"model.mask.tokens is {settings.tokens}, captions have {num_tokens} tokens (model.num_tokens): lower it"
        )
    return TokenDrop(settings)


def drop_patches(towers: PreTrainedModel, settings: MaskSettings) -> PatchDrop | None:
    """Installs the hook; None without dropping."""
    if settings.drop == 0:
        return None
    if towers.config.model_type not in ("siglip", "clip"):
        raise UserError(
            f"model.mask.drop works for siglip and clip vision towers, this model is {towers.config.model_type!r}: "
            f"leave it out"
        )
    hook = PatchDrop(settings, num_special=1 if towers.config.model_type == "clip" else 0)
    towers.get_submodule("vision_model.embeddings").register_forward_hook(hook)
    return hook
