"""A model's preprocessing: read from a Hugging Face directory, used by the loader, written on export."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

# Not from transformers' top level: without torchvision, 5.17 (unlike 5.20) has only a placeholder there that raises.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from trainer.core.types import Preprocess, UserError
from trainer.models import open_clip
from trainer.models.hf_errors import reading
from trainer.models.naflex import NAFLEX, budget_of
from trainer.models.pooling import SIGLIP
from trainer.models.settings import ModelSettings
from trainer.models.vision_text import PAIR

logger = logging.getLogger(__name__)


RESAMPLE: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {
    0: "nearest",
    2: "bilinear",
    3: "bicubic",
}  # Pillow's numbers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
PAIR_TOKENS = 64
"""Default context length of a new pair."""


class Tokenize:
    """Captions -> (tokens [b, n] int64, mask [b, n] bool, True on real tokens); cut or padded to ``num_tokens``.
    Picklable."""

    def __init__(self, tokenizer: Any, num_tokens: int) -> None:
        self.tokenizer, self.num_tokens = tokenizer, num_tokens

    def lengths(self, captions: list[str]) -> list[int]:
        """Tokens of each caption before it is cut or padded."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        found = self.tokenizer(captions, padding=False, truncation=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    def noise(self, draws: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Captions of random tokens, of random lengths, between the special tokens that a caption has; as ``__call__``.

        ``draws`` [b, 1 + num_tokens] in [0, 1) decide: the first the length, the others the tokens.
        """
        special = set(self.tokenizer.all_special_ids)
        ordinary = np.setdiff1d(np.arange(len(self.tokenizer)), list(special))
        example = self.tokenizer("a", verbose=False)["input_ids"]
        first = next((place for place, token in enumerate(example) if token not in special), len(example))
        before, after = example[:first], [token for token in example[first:] if token in special]
        lengths = 1 + (draws[:, 0] * (self.num_tokens - len(before) - len(after))).astype(np.int64)
        words = ordinary[(draws[:, 1:] * len(ordinary)).astype(np.int64)]
        rows = [[*before, *row[:n].tolist(), *after] for row, n in zip(words, lengths, strict=True)]
        found = self.tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=self.num_tokens, return_attention_mask=True
        )
        return _tensors(found)

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        # A loader worker may be forked after the parent has tokenized: the Rust library's threads do not survive that.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if not captions:
            return torch.zeros(0, self.num_tokens, dtype=torch.int64), torch.zeros(0, self.num_tokens, dtype=torch.bool)
        found = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.num_tokens,
            return_attention_mask=True,
            verbose=False,
        )
        return _tensors(found)


def _tensors(found: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor(found["input_ids"], dtype=torch.int64), torch.tensor(found["attention_mask"], dtype=torch.bool)


def read_tokenizer(settings: ModelSettings) -> Any:
    """The tokenizer in the recipe, or the one of the pretrained model."""
    name = settings.tokenizer or settings.path or (settings.text and settings.text.path)
    assert isinstance(name, str)
    key = "model.tokenizer" if settings.tokenizer else "model.path" if settings.path else "model.text.path"
    with reading(key, name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if open_clip.is_open_clip(settings.path):
        assert settings.path is not None
        tokenizer = open_clip.clean_like_open_clip(tokenizer, settings.path)
    return tokenizer


def warn_of_mask(path: str, config: PretrainedConfig, tokenizer: Any) -> None:
    """Warns if plain transformers would mask a SigLIP's padding, to which SigLIP attends."""
    if config.model_type in SIGLIP and "attention_mask" in tokenizer.model_input_names:
        logger.warning(
            f"{path}: its tokenizer returns an attention mask, with which plain transformers gives other text "
            "embeddings than SigLIP was trained with; RingLIP attends to padding, and the exported tokenizer has no "
            "mask"
        )


def preprocess(path: str) -> Preprocess:
    """The preprocessing of the CLIP or SigLIP model in ``path``, a Hugging Face directory or name."""
    from trainer.models.towers import make_config, quietly

    settings = ModelSettings(path=path)
    with quietly():
        tokenizer = read_tokenizer(settings)
        return read_preprocess(settings, make_config(settings, tokenizer), tokenizer)


def read_preprocess(settings: ModelSettings, config: PretrainedConfig, tokenizer: Any) -> Preprocess:
    """Sizes and statistics from the directory of a pretrained model, or the family's defaults for a new one."""
    num_tokens = settings.num_tokens or config.text_config.max_position_embeddings
    if config.model_type == PAIR and settings.num_tokens is None:
        # A language model's 512 positions are for pages of text; an exported pair's tokenizer has its context length.
        num_tokens = min(num_tokens, tokenizer.model_max_length if settings.path else PAIR_TOKENS)
    tokenize = Tokenize(tokenizer, num_tokens)
    if config.model_type == "clip":
        tokenizer.padding_side = "right"
    path = settings.image.path if settings.image else settings.path
    key = "model.image.path" if settings.image else "model.path"
    found = _image_processor(key, path) if path else None
    if config.model_type == NAFLEX:
        patch = config.vision_config.patch_size
        size = patch, (budget_of(found, config, settings.num_patches) + 1) * patch
        resample = RESAMPLE[int(found.resample)] if found else "bilinear"
        return Preprocess(size, "patches", resample, *_statistics(found), num_tokens, tokenize)
    side = settings.image_size or config.vision_config.image_size
    if found is None:
        if config.model_type == "clip":
            return Preprocess((side, side), "crop", "bicubic", CLIP_MEAN, CLIP_STD, num_tokens, tokenize)
        return Preprocess((side, side), "squash", "bicubic", HALF, HALF, num_tokens, tokenize)
    resize: Literal["crop", "squash"] = "crop" if getattr(found, "do_center_crop", False) else "squash"
    return Preprocess((side, side), resize, RESAMPLE[int(found.resample)], *_statistics(found), num_tokens, tokenize)


def _image_processor(key: str, path: str) -> Any:
    with reading(key, path, "its image processor"):
        found = (
            open_clip.image_processor(path)
            if open_clip.is_open_clip(path)
            else AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        )
    if int(found.resample) not in RESAMPLE:
        known = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise UserError(
            f"{path!r}: its image processor resamples with Pillow's filter {found.resample}; known: {known}"
        )
    return found


def _statistics(found: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, standard deviation) of an image processor; SigLIP's if it has none."""
    if found is None:
        return HALF, HALF
    mean, std = _three(found.image_mean, found.do_normalize, 0.0), _three(found.image_std, found.do_normalize, 1.0)
    if getattr(
        found, "include_top", False
    ):  # EfficientNet's processor divides by the deviation twice, as in the training of its classifier
        std = std[0] ** 2, std[1] ** 2, std[2] ** 2
    return mean, std


def _three(values: Any, used: bool | None, otherwise: float) -> tuple[float, float, float]:
    red, green, blue = values if used else [otherwise] * 3
    return float(red), float(green), float(blue)


def make_processor(preprocess: Preprocess, config: PretrainedConfig) -> Any:
    """The Hugging Face processor that is equivalent to ``preprocess``."""
    from transformers import CLIPProcessor, Siglip2Processor, SiglipProcessor, VisionTextDualEncoderProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    assert isinstance(preprocess.tokenize, Tokenize)
    height, width = preprocess.image_size
    model_type, patch_size = config.model_type, getattr(config.vision_config, "patch_size", 0)
    common: dict[str, Any] = {
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": {name: number for number, name in RESAMPLE.items()}[preprocess.resample],
    }
    if model_type == NAFLEX:
        images: Any = Siglip2ImageProcessorPil(patch_size=patch_size, max_num_patches=width // patch_size - 1, **common)
    elif preprocess.resize == "crop":
        size = {"shortest_edge": min(height, width)}
        images = CLIPImageProcessorPil(size=size, crop_size={"height": height, "width": width}, **common)
    else:
        images = SiglipImageProcessorPil(size={"height": height, "width": width}, **common)
    tokenizer = preprocess.tokenize.tokenizer
    tokenizer.model_max_length = tokenizer.init_kwargs["model_max_length"] = preprocess.num_tokens
    if model_type in SIGLIP:
        # SigLIP attends to padding: a mask in the processor's output would change its embeddings.
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
        return (SiglipProcessor if model_type == "siglip" else Siglip2Processor)(images, tokenizer)
    return (VisionTextDualEncoderProcessor if model_type == PAIR else CLIPProcessor)(images, tokenizer)
