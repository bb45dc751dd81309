"""Time of a training step with the locked tower run, and with its embeddings stored, in one run.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.siglit                          # 1 CPU rank; prints a markdown table
    OMP_NUM_THREADS=1 python -m tests.benchmarks.siglit --pairs 32768 --ranks 2 --rounds 1 --only-stored

The whole of a step is timed, loader included: reading, decoding and resizing the images (112 x 112 JPEGs),
tokenizing, both passes, the optimizer. Each contender has processes of its own; the table holds medians of their
processor time (waiting for other programs does not count) and the ratio. The locked tower is a ViT-Ti/16 (5.5 M
parameters, random weights: time does not depend on them), the text tower has 2 layers of width 128: LiT's case, a large
tower that is known and a small one that learns.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support.forked_ranks import run_ranks
from tests.support.shards import Members, write_shards
from tests.support.tiny_models import tiny_captions, tiny_tokenizer
from trainer import checkpoint, config, embed, losses, models
from trainer.core import distributed
from trainer.data import build_loader
from trainer.engine import build_engine
from trainer.optim import build_optimizer
from trainer.step import train_step

SIDE = 112


def sample(number: int) -> Members:
    """A smooth image as a JPEG, and a caption."""
    small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG")
    return {"jpg": data.getvalue(), "txt": tiny_captions(1, number)[0].encode()}


def prepare(folder: Path, pairs: int, pictures: int) -> Path:
    """Shards, a saved tower and the recipe that trains on its stored embeddings."""
    write_shards(folder / "shards", [pictures], make=sample)
    small: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
    }
    ViTModel(ViTConfig(**small, image_size=SIDE, patch_size=16)).save_pretrained(folder / "vit")
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "vit")
    bert = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    tree = {
        "run": {"directory": str(folder / "run"), "samples": 10**9},
        "model": {
            "image": {"path": str(folder / "vit")},
            "text": {"config": {"model_type": "bert", **bert}},
            "tokenizer": tiny_tokenizer(),
            "embed_dim": 128,
            "num_tokens": 8,
            "lock": {"image": True},
            "stored": {"image": "vit"},
        },
        "data": {"train": str(folder / "shards"), "workers": 0, "cache_decoded": 0, "cache_dir": str(folder / "cache")},
        "batch": {"size": pairs, "micro_batch": 64},
        "engine": {"precision": "fp32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def measure(path: Path, rounds: int, overrides: list[str]) -> list[float]:
    """Processor seconds of each step but the first two, which also fill the loader's queue."""
    recipe, rank, world = config.load(path, overrides), distributed.rank(), distributed.world_size()
    model = models.build(recipe.model)
    engine = build_engine(model, build_optimizer(model, recipe.optim, model.parameter_groups()), recipe.engine)
    loss, rows = losses.build(recipe.loss), recipe.batch.micro_batch
    assert isinstance(rows, int)
    times = []
    with build_loader(recipe.data, model.preprocess, recipe.batch.size, rank, world, 0, 0) as loader:
        for _ in range(rounds + 2):
            began = time.process_time()
            checkpoint.seed_step(0, 0, rank)
            train_step(engine, next(loader), loss, rows)
            times.append(time.process_time() - began)
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256, help="global batch")
    parser.add_argument(
        "--pictures", type=int, default=256, help="in the dataset; a larger batch goes through it several times"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--only-stored", action="store_true", help="leave the tower out: for batches that it would take an hour for"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = prepare(Path(folder), options.pairs, options.pictures)
        began = time.perf_counter()
        run_ranks(embed.main, options.ranks, [str(path)], timeout=3600)
        print(f"embedded {options.pictures} images in {time.perf_counter() - began:.1f} s")
        contenders = (
            {"stored": []} if options.only_stored else {"stored": [], "tower": ["model.precomputed.image=null"]}
        )
        median = {}
        for name, overrides in contenders.items():
            ranks = run_ranks(measure, options.ranks, path, options.rounds, overrides, timeout=3600)
            median[name] = statistics.median([seconds for rank in ranks for seconds in rank])
    print(
        f"| global batch {options.pairs}, {options.ranks} rank(s) | processor seconds a step | ratio |\n|---|---|---|"
    )
    for name, words in (("tower", "locked tower run"), ("stored", "stored embeddings")):
        if name in median:
            print(f"| {words} | {median[name]:.2f} | {median[name] / median['stored']:.1f} |")


if __name__ == "__main__":
    main()
