"""Shapes of well-known pretrained models, so that they can be planned without the network.

Only what Hugging Face's config classes do not have by default is listed; sources are the models' own config.json files.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from trainer.core.types import Preprocess
from trainer.models import ModelSettings
from trainer.models.preprocess import CLIP_MEAN, CLIP_STD, HALF, Tokenize, make_processor
from trainer.models.towers import quietly


def _siglip(
    width: int, depth: int, heads: int, hidden: int, side: int, patch: int, tokens: int, vocabulary: int
) -> dict[str, Any]:
    tower = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
    }
    text = {**tower, "vocab_size": vocabulary, "max_position_embeddings": tokens, "projection_size": width}
    return {
        "model_type": "siglip",
        "vision_config": {**tower, "image_size": side, "patch_size": patch},
        "text_config": text,
    }


def _clip(
    image: tuple[int, int, int], side: int, patch: int, text: tuple[int, int, int], joint: int, ratio: float = 4
) -> dict[str, Any]:
    def tower(shape: tuple[int, int, int], ratio: float) -> dict[str, Any]:
        width, depth, heads = shape
        hidden = int(width * ratio)
        return {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": hidden,
        }

    vision_config = {**tower(image, ratio), "image_size": side, "patch_size": patch, "projection_dim": joint}
    text_config = {**tower(text, 4), "projection_dim": joint}
    return {"model_type": "clip", "projection_dim": joint, "vision_config": vision_config, "text_config": text_config}


BASE, LARGE, SO400M = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)
KNOWN: dict[str, dict[str, Any]] = {
    **{f"google/siglip-base-patch16-{side}": _siglip(*BASE, side, 16, 64, 32000) for side in (224, 256, 384, 512)},
    "google/siglip-base-patch16-256-multilingual": _siglip(*BASE, 256, 16, 64, 250000),
    **{f"google/siglip-large-patch16-{side}": _siglip(*LARGE, side, 16, 64, 32000) for side in (256, 384)},
    "google/siglip-so400m-patch14-224": _siglip(*SO400M, 224, 14, 16, 32000),
    "google/siglip-so400m-patch14-384": _siglip(*SO400M, 384, 14, 64, 32000),
    **{f"google/siglip2-base-patch16-{side}": _siglip(*BASE, side, 16, 64, 256000) for side in (224, 256, 384, 512)},
    **{f"google/siglip2-large-patch16-{side}": _siglip(*LARGE, side, 16, 64, 256000) for side in (256, 384, 512)},
    **{f"google/siglip2-so400m-patch14-{side}": _siglip(*SO400M, side, 14, 64, 256000) for side in (224, 384)},
    "openai/clip-vit-base-patch32": _clip((768, 12, 12), 224, 32, (512, 12, 8), 512),
    "openai/clip-vit-base-patch16": _clip((768, 12, 12), 224, 16, (512, 12, 8), 512),
    "openai/clip-vit-large-patch14": _clip((1024, 24, 16), 224, 14, (768, 12, 12), 768),
    "openai/clip-vit-large-patch14-336": _clip((1024, 24, 16), 336, 14, (768, 12, 12), 768),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": _clip((768, 12, 12), 224, 32, (512, 12, 8), 512),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": _clip((1024, 24, 16), 224, 14, (768, 12, 12), 768),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip((1280, 32, 16), 224, 14, (1024, 24, 16), 1024),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": _clip((1408, 40, 16), 224, 14, (1024, 24, 16), 1024, ratio=6144 / 1408),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _clip((1664, 48, 16), 224, 14, (1280, 32, 20), 1280, ratio=8192 / 1664),
}
"""Hub name -> config.json."""


def lookup(name: str) -> dict[str, Any] | None:
    """The config of a well-known model."""
    return next((config for known, config in KNOWN.items() if known.lower() == name.lower()), None)


@contextlib.contextmanager
def stand_in(settings: ModelSettings, config: dict[str, Any]) -> Iterator[ModelSettings]:
    """``settings`` with a directory in place of what would have to be downloaded: the config, and a tokenizer of the
    right size."""
    cls: Any = CONFIG_MAPPING[config["model_type"]]
    with quietly():
        full = cls(**{key: value for key, value in config.items() if key != "model_type"})
    side, tokens = full.vision_config.image_size, full.text_config.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        core = Tokenizer(
            models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[END]": full.text_config.vocab_size - 1}, unk_token="[UNK]")
        )
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        core.post_processor = processors.TemplateProcessing(
            single="$A [END]", special_tokens=[("[END]", full.text_config.vocab_size - 1)]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
        )
        full.text_config.eos_token_id = full.text_config.vocab_size - 1
        clip = config["model_type"] == "clip"
        statistics = (CLIP_MEAN, CLIP_STD) if clip else (HALF, HALF)
        tokenize = Tokenize(tokenizer, tokens)
        preprocess = Preprocess((side, side), "crop" if clip else "squash", "bicubic", *statistics, tokens, tokenize)
        with quietly():
            make_processor(preprocess, full).save_pretrained(folder)
            full.save_pretrained(folder)
        yield settings.model_copy(update={"path": folder, "tokenizer": None})
