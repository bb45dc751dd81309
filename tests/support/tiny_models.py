"""Models so small that a test trains them in milliseconds, with a word tokenizer and batches to match.

model = tiny_model("siglip")                   # "clip" or "siglip2"; the same weights for the same seed
batch = tiny_batch(rows=8, seed=0)             # pixels [8, 3, 16, 16] uint8, tokens [8, 8] int64, ...
"""

from __future__ import annotations

import functools
import random
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Siglip2Tokenizer

from trainer.core.types import Batch
from trainer.models import DualEncoder, ModelSettings, build

KINDS = ("siglip", "clip")
WORDS = "a an the red green blue small large cat dog house tree of on under with old new bright dark".split()  # noqa: SIM905 (easier to read)
NUM_TOKENS = 8
IMAGE_SIZE = 16
_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def tiny_tokenizer() -> str:
    """A directory with a word-level tokenizer: [PAD] 0, [UNK] 1, words from 2, [END] last. Removed when the process
    ends."""
    names = ["[PAD]", "[UNK]", *WORDS, "[END]"]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", len(names) - 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    wrapped.save_pretrained(folder.name)
    return folder.name


@functools.cache
def letter_tokenizer(cls: Any) -> str:
    """A directory with a tokenizer of SigLIP 2's kind, a token a letter: GemmaTokenizer beside the fixed models,
    Siglip2Tokenizer (which transformers insists on) beside the NaFlex ones.
    """
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    own = {} if cls is Siglip2Tokenizer else {"add_bos_token": False, "add_eos_token": True}
    cls(vocab=vocabulary, padding_side="right", **own).save_pretrained(folder.name)
    return folder.name


def tiny_config(kind: str = "siglip", layers: int = 2, width: int = 32, dropout: float = 0.0) -> dict[str, Any]:
    """``model.config`` of a tiny model; ``dropout`` (in attention) makes the forward pass random."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "attention_dropout": dropout,
    }
    config: dict[str, Any] = {
        "model_type": kind,
        "vision_config": {
            **tower,
            "patch_size": 8,
            **({"num_patches": 4} if kind == "siglip2" else {"image_size": IMAGE_SIZE}),
        },
        "text_config": {**tower, "max_position_embeddings": NUM_TOKENS},
    }
    if kind == "clip":
        config["projection_dim"] = width
    return config


def tiny_settings(
    kind: str = "siglip", layers: int = 2, width: int = 32, dropout: float = 0.0, **more: Any
) -> ModelSettings:
    """``model:`` of a recipe for a tiny model; ``more`` are further keys of that section."""
    return ModelSettings(config=tiny_config(kind, layers, width, dropout), tokenizer=tiny_tokenizer(), **more)


def tiny_model(kind: str = "siglip", seed: int = 0, **more: Any) -> DualEncoder:
    """A tiny model with random weights; equal for equal ``seed``. ``more`` goes to tiny_settings."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(tiny_settings(kind, **more))


PRETRAINED = ("clip", "siglip", "siglip2 fixed", "siglip2 naflex")
"""The families that are finetuned. A fixed SigLIP 2 is SigLIP's model with Gemma's tokenizer; a NaFlex one is a model
of its own."""


def tiny_pretrained(kind: str, folder: Path, seed: int = 7) -> DualEncoder:
    """Leaves a Hugging Face directory of one of PRETRAINED in ``folder``, as if it had been downloaded, and returns
    what it holds."""
    model_type = {"siglip2 fixed": "siglip", "siglip2 naflex": "siglip2"}.get(kind, kind)
    tokenizer = {"siglip2 fixed": GemmaTokenizer, "siglip2 naflex": Siglip2Tokenizer}.get(kind)
    settings = ModelSettings(
        config=tiny_config(model_type), tokenizer=letter_tokenizer(tokenizer) if tokenizer else tiny_tokenizer()
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(settings).eval()
    model.save_pretrained(folder)
    return model


def tiny_captions(rows: int, seed: int = 0) -> list[str]:
    """Captions of 1 to 6 known words."""
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 6))) for _ in range(rows)]


def tiny_batch(rows: int, seed: int = 0) -> Batch:
    """Random images and captions; ``groups`` are equal where captions are."""
    generator = torch.Generator().manual_seed(seed)
    captions = tiny_captions(rows, seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer())
    found = tokenizer(captions, padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt")
    groups = torch.tensor([captions.index(caption) for caption in captions], dtype=torch.int64)
    pixels = torch.randint(0, 256, (rows, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    ids = torch.arange(rows) + 1000 * seed
    return Batch(pixels, found["input_ids"], found["attention_mask"].bool(), ids, groups)
