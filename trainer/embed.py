"""Writes embeddings beside the shards, once: training then never runs what made them. They are a locked tower's
(SigLiT, arXiv 2303.15343, section 4.2), or of a teacher's views and captions (MobileCLIP, arXiv 2311.17049).

    python -m trainer.embed RECIPE                                  # the columns of model.precomputed, for data.train
    python -m trainer.embed RECIPE model.precomputed.image=vit_b16 --storage int8
    python -m trainer.embed RECIPE distill.teacher=PATH distill.stored=vitl --views 8     # a teacher, or several [A,B]
    torchrun --nproc-per-node 8 -m trainer.embed RECIPE             # each rank embeds its share (or deepspeed --module)
    deepspeed --module trainer.train RECIPE                         # reads them

The column is stored beside the tars (columns/NAME.npy, with the tower's fingerprint in the manifest), like those of
`python -m data_tools join`. To continue a killed run, give the same command again; the manifest is written last. fp16
takes 2 bytes per number, int8 one and a factor per row. Rank 0 joins the parts at the end: raise run.timeout if that
takes more than ten minutes. Of a teacher, --views augmentations of every image (data.augment of the recipe; training
draws one of them) and all captions are embedded, as fp16 or fp32. Exit codes: 0 written (or already there), 2 a mistake
in the recipe or the data.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from data_tools.io.errors import run_command
from data_tools.io.progress import Progress
from trainer import config
from trainer.config import Recipe
from trainer.core import collectives, distributed
from trainer.core.collectives import on_main
from trainer.core.help import describe
from trainer.core.types import PrecomputedTower, UserError
from trainer.data.embedding_column import ColumnWriter, Half, Storage
from trainer.data.open import open_source
from trainer.data.read_ahead import batches, read_ahead
from trainer.data.settings import DataSettings, SourceSettings, sharded
from trainer.data.sharded_dataset import ShardedDataset
from trainer.data.transforms import Damaged, decode, fit, least_size
from trainer.distill import DistillSettings
from trainer.engine.precision import DTYPES, Precision
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.precomputed import PrecomputedSettings, precomputed_tower
from trainer.reinforce import TeacherEmbedder, Views

logger = logging.getLogger("trainer.embed")  # not __name__, which is __main__ here


def main(argv: list[str]) -> int:
    options = _options(argv)
    recipe = config.load(options.recipe, options.overrides)
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be 1 or more")
    distill, precision = recipe.distill, options.precision or recipe.engine.computes_in
    of_teacher = distill is not None and distill.stored is not None
    if recipe.model.precomputed.side is None and not of_teacher:
        raise UserError(
            "model.precomputed is empty: name the column to write, for example model.precomputed.image=vit_b16 (with "
            "model.lock.image); of a teacher, distill.teacher and distill.stored"
        )
    with distributed.process_group(recipe.run.timeout) if "RANK" in os.environ else nullcontext():
        embedder: Embedder | TeacherEmbedder
        if distill is not None and of_teacher:
            if not distill.teachers:
                raise UserError("distill.teacher is empty: name the model whose embeddings are to be written")
            views = Views(options.views, recipe.run.seed)
            embedder = TeacherEmbedder(distill, recipe.data, views, options.batch_size, precision, options.storage)
        else:
            embedder = tower_embedder(recipe, options.batch_size, precision, options.storage)
        for settings in (
            [SourceSettings(path=sharded(path)) for path in options.data] if options.data else recipe.data.sources
        ):
            embed(embedder, open_source(settings, recipe.data))
    return 0


def tower_embedder(recipe: Recipe, batch_size: int, precision: str, storage: Storage) -> Embedder:
    """Embeds with the locked tower of ``model.precomputed``."""
    model = build(recipe.model.without_precomputed_tower)
    precomputed = precomputed_tower(model.towers, model.preprocess, recipe.model.precomputed)
    model = model.to(distributed.device()).eval()
    return Embedder(model, precomputed, recipe.data, batch_size, precision, tower_path(recipe.model), storage)


@torch.inference_mode()
def embed(embedder: Embedder | TeacherEmbedder, source: ShardedDataset) -> None:
    """Writes the columns of one dataset; every rank calls it."""
    writer = embedder.writer(source)
    if on_main(lambda: {"there": writer.finished()})["there"]:
        logger.info(f"{source.dataset.root}: {writer.name!r} is already there, written by the same model")
        return
    with ExitStack() as lock:
        missing = on_main(lambda: {"parts": lock.enter_context(writer.locked())})["parts"]
        mine = missing[distributed.rank() :: distributed.world_size()]
        done = source.size - sum(len(writer.samples(part)) for part in missing)
        if done:
            logger.info(f"continuing: {done:,} of {source.size:,} samples are already embedded")
        with Progress(source.size, done, "samples", quiet=not distributed.is_main()) as progress:
            for part in mine:
                batches = []
                for batch in embedder.rows(source, writer.samples(part)):
                    batches.append(batch)
                    progress.add(len(batch[0]) * distributed.world_size())  # assumes that the other ranks are as fast
                writer.write(part, *map(np.concatenate, zip(*batches, strict=True)))
        collectives.barrier()
        empty = on_main(lambda: {"empty": writer.finish()})["empty"]
    left = f", {empty:,} samples could not be used" if empty else ""
    logger.info(f"{source.dataset.root}: {source.size:,} samples, {embedder.title}{left}")


class Embedder:
    """Computes the locked tower's outputs for samples of a source."""

    def __init__(
        self,
        model: DualEncoder,
        precomputed: PrecomputedTower,
        data: DataSettings,
        batch_size: int,
        precision: str,
        origin: str,
        storage: Storage = "fp16",
    ) -> None:
        self.model, self.precomputed, self.data, self.origin = model, precomputed, data, origin
        self.storage = storage
        self.batch_size, self.precision = batch_size, precision
        self.device = distributed.device()
        self.threads = distributed.cores()

    @property
    def title(self) -> str:
        """For the log."""
        return f"an embedding of {self.precomputed.width} numbers each, as {self.precomputed.column!r}"

    def writer(self, source: ShardedDataset) -> ColumnWriter:
        """Writes the column of one dataset."""
        return ColumnWriter(source.dataset, self.precomputed, self.storage, self.facts(source))

    def facts(self, source: ShardedDataset) -> dict[str, object]:
        """The column's entry in the manifest, besides the tower."""
        texts = {"captions": source.fields} if self.precomputed.side == "text" else {}
        return {"model": self.origin, "precision": self.precision, **texts}

    def rows(self, source: ShardedDataset, samples: range) -> Iterator[tuple[Half]]:
        """Yields [b, k] float16 for each batch of ``samples`` in order, with zeros for unusable ones. Reads ahead of
        the tower."""
        for found in read_ahead(batches(samples, self.batch_size), partial(self._read, source), self.threads):
            yield (self._embed(found),)

    def _read(self, source: ShardedDataset, sample: int) -> Tensor | str | None:
        """The tower's input: uint8 [3, h, w], or a caption; None if the sample cannot be used."""
        least = least_size(self.data.jpeg_scaling, self.model.preprocess)
        try:
            if self.precomputed.side == "text":
                return self.caption(source, sample)
            return fit(decode(source.picture(sample), self.data.max_pixels, least), self.model.preprocess)
        except Damaged:
            return None

    def caption(self, source: ShardedDataset, sample: int) -> str:
        """The text that is embedded of a sample. Raises Damaged where it has none."""
        captions = source.captions(sample)
        if len(captions) > 1:
            raise UserError(
                f"{source.key(sample)} has {len(captions)} captions, a stored text tower has one per image: set "
                f"data.caption"
            )
        return captions[0]

    def output(self, *inputs: Tensor) -> Tensor:
        """[b, k]: what is stored for ``pixels``, or for ``tokens, token_mask``."""
        return self.model.tower_output(self.precomputed.side, *inputs)

    def _embed(self, found: list[Tensor | str | None]) -> Half:
        rows = np.zeros((len(found), self.precomputed.width), np.float16)
        usable = [row for row, one in enumerate(found) if one is not None]
        if not usable:
            return rows
        with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            if self.precomputed.side == "image":
                pixels = torch.stack([one for one in found if isinstance(one, Tensor)])
                output = self.output(distributed.to_device(pixels, self.device))
            else:
                tokens, mask = self.model.preprocess.tokenize([one for one in found if isinstance(one, str)])
                inputs = (distributed.to_device(value, self.device) for value in (tokens, mask))
                output = self.output(*inputs)
        rows[usable] = output.half().cpu().numpy()
        return rows


def tower_path(settings: ModelSettings) -> str:
    """The path of the locked tower."""
    tower = settings.image if settings.precomputed.side == "image" else settings.text
    return str(settings.path or (tower.path if tower else ""))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.embed",
        description=__doc__,
        epilog=describe(PrecomputedSettings, "model.precomputed.") + "\n" + describe(DistillSettings, "distill."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="the recipe that will train on them")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="override the recipe")
    parser.add_argument(
        "--data", action="append", metavar="SHARDS", help="embed these instead of data.train; may be repeated"
    )
    parser.add_argument("--storage", choices=get_args(Storage), default="fp16", help="storage format (default fp16)")
    parser.add_argument(
        "--views", type=int, default=1, metavar="K", help="of a teacher: augmentations of each image (default 1)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="samples per forward pass (default 256)"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="precision of the tower (default: what the recipe trains in)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
