"""Position embeddings for other sizes than a model was trained with: larger images (``model.image_size``), longer
captions (``model.num_tokens``).

    model: {path: openai/clip-vit-base-patch32, num_tokens: 248}      # 77 position embeddings become 248

Captions as in Long-CLIP (arXiv 2403.15378, section 3.2): the first 20 position embeddings, which are well trained,
stay, the rest is interpolated. CLIP, being causal, then embeds captions of up to 20 tokens as before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.core.types import UserError
from trainer.models.pooling import SIGLIP

if TYPE_CHECKING:
    from trainer.models.settings import ModelSettings

logger = logging.getLogger(__name__)

KEPT = 20
"""Position embeddings that stay (Long-CLIP), if the table has at least twice as many; else half of it."""
TEXT_POSITIONS = "text_model.embeddings.position_embedding"


def check_num_tokens(config: PretrainedConfig, settings: ModelSettings) -> None:
    """Raises UserError where captions are to be longer than the text tower reads, and cannot be made so."""
    wanted, positions = settings.num_tokens, config.text_config.max_position_embeddings
    if not wanted or wanted <= positions:
        return
    if settings.path is None and settings.config is not None:
        raise UserError(
            f"model.num_tokens is {wanted}, model.config.text_config has {positions} position embeddings; raise its "
            "max_position_embeddings, or lower num_tokens"
        )
    if config.model_type not in ("clip", *SIGLIP):
        raise UserError(
            f"model.num_tokens is {wanted}, the text tower ({config.text_config.model_type}) has {positions} "
            "position embeddings, and only those of CLIP and SigLIP can be stretched: lower it"
        )
    if settings.text is None and positions < 4:
        raise UserError(
            f"model.num_tokens is {wanted}: {positions} position embeddings are too few to stretch; lower it"
        )


@torch.no_grad()
def stretch_texts(towers: PreTrainedModel, num_tokens: int, quiet: bool = False) -> None:
    """Makes a CLIP or SigLIP text tower read captions of ``num_tokens``, where that is more than it has positions."""
    text = towers.config.text_config
    old = text.max_position_embeddings
    if towers.config.model_type not in ("clip", *SIGLIP) or num_tokens <= old:
        return
    embeddings: Any = towers.get_submodule("text_model.embeddings")
    last = towers.config.model_type in SIGLIP
    weight = stretched(embeddings.position_embedding.weight, num_tokens, keep_last=last)
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    embeddings.position_ids = torch.arange(num_tokens, device=weight.device)[None]
    text.max_position_embeddings = num_tokens
    if not quiet:
        effect = (
            "SigLIP attends to padding, so that short captions too embed otherwise until it is trained"
            if last
            else f"captions of up to {kept(old)} tokens embed as before"
        )
        logger.info(f"model.num_tokens {num_tokens}: the text position embeddings are stretched from {old}; {effect}")


def kept(positions: int) -> int:
    """How many of so many position embeddings stay as they are."""
    return min(KEPT, positions // 2)


def stretched(weight: Tensor, size: int, keep_last: bool) -> Tensor:
    """Position embeddings [n, d] -> [size, d], the first ``kept(n)`` as they are, the rest interpolated linearly.

    Long-CLIP spaces the rest evenly and extends the line of the last two beyond the end. With ``keep_last`` the last
    position stays the last: SigLIP reads a caption's embedding there.
    """
    positions = weight.shape[0]
    first = kept(positions)
    step = (positions - 1 - first) / (size - 1 - first) if keep_last else (positions - first) / (size - first)
    places = first + step * torch.arange(size - first, dtype=torch.float64, device=weight.device)
    left = places.floor().long().clamp(max=positions - 2)
    share = (places - left)[:, None]
    rest = weight[left].double() * (1 - share) + weight[left + 1].double() * share
    return torch.cat([weight[:first], rest.to(weight.dtype)]).contiguous()


@torch.no_grad()
def resize_images(towers: PreTrainedModel, size: int) -> None:
    """Makes the vision tower read ``size`` x ``size`` images: its position embeddings are resampled (bicubic, as
    FlexiViT's baseline)."""
    config = towers.config.vision_config
    if size % config.patch_size:
        raise UserError(f"model.image_size {size} is not a multiple of the patch size {config.patch_size}")
    if size == config.image_size:
        return
    embeddings: Any = towers.get_submodule("vision_model.embeddings")
    old, new = config.image_size // config.patch_size, size // config.patch_size
    weight: Tensor = embeddings.position_embedding.weight
    special = weight.shape[0] - old * old  # CLIP's class token comes first
    grid = weight[special:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    resized = torch.cat([weight[:special], grid.reshape(-1, new * new).T])
    embeddings.position_embedding = nn.Embedding.from_pretrained(resized.contiguous(), freeze=False)
    embeddings.position_ids = torch.arange(len(resized), device=weight.device)[None]
    embeddings.image_size = config.image_size = size
    embeddings.num_patches, embeddings.num_positions = new * new, len(resized)
