"""Embeds k views of every image and all captions of a dataset with one or several teachers, for `python -m
trainer.embed` (MobileCLIP, arXiv 2311.17049, section 3.1; trainer/data/stored_teacher.py says what is stored)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.core import distributed
from trainer.core.types import Preprocess, UserError
from trainer.data.augment import picture
from trainer.data.datacompdr import STORED
from trainer.data.embedding_column import Storage
from trainer.data.read_ahead import batches, read_ahead
from trainer.data.settings import DataSettings
from trainer.data.sharded_dataset import ShardedDataset, hash_caption
from trainer.data.stored_teacher import DTYPES, TeacherWriter, draws
from trainer.data.transforms import Damaged
from trainer.distill import DistillSettings, load_teacher
from trainer.engine.precision import DTYPES as PRECISIONS
from trainer.models import DualEncoder
from trainer.models.param_groups import Tower
from trainer.models.precomputed import fingerprint

Inputs = tuple[list[list[Tensor]], list[str]]
"""Of one sample: a teacher's views of the image, for every teacher; the captions."""


@dataclass(frozen=True)
class Views:
    """What is stored of each image."""

    count: int
    seed: int


class TeacherEmbedder:
    """Computes the rows of TeacherColumns for samples of a source."""

    def __init__(
        self,
        settings: DistillSettings,
        data: DataSettings,
        views: Views,
        batch_size: int,
        precision: str,
        storage: Storage,
    ) -> None:
        if views.count < 1:
            raise UserError(f"--views {views.count}: must be 1 or more")
        if views.count > 1 and not data.augment.active:
            raise UserError(
                f"--views {views.count}: all would be the same image; set data.augment, for example "
                "data.augment.crop_scale=[0.4,1]"
            )
        assert settings.stored is not None
        if settings.stored == STORED:
            raise UserError(f"distill.stored={STORED} is what DataCompDR's tars hold: give the columns another name")
        self.name, self.data, self.views, self.storage = settings.stored, data, views, storage
        self.batch_size, self.precision = batch_size, precision
        self.device, self.threads = distributed.device(), distributed.cores()
        self.paths = settings.teachers
        self.models = [load_teacher(path).to(self.device).eval() for path in self.paths]
        resizes = {model.preprocess.resize for model in self.models}
        if len(resizes) > 1:
            raise UserError(
                f"distill.teacher: one view cannot be resized by {' and by '.join(sorted(resizes))}; take teachers of "
                "one kind"
            )
        self.teachers = [self._facts(path, model) for path, model in zip(self.paths, self.models, strict=True)]

    @property
    def title(self) -> str:
        """For the log."""
        width = sum(one["width"] for one in self.teachers)
        return f"embeddings of {self.views.count} view(s) and all captions, {width} numbers each, as {self.name!r}"

    def writer(self, source: ShardedDataset) -> TeacherWriter:
        """Writes this teacher's columns of one dataset."""
        entry = {
            "teachers": self.teachers,
            "views": {
                "count": self.views.count,
                "seed": self.views.seed,
                "augment": self.data.augment.model_dump(mode="json"),
                "resize": self.models[0].preprocess.resize,
            },
            "captions": source.fields or ["txt"],
            "precision": self.precision,
        }
        return TeacherWriter(source.dataset, self.name, entry, num_captions(source), self.storage)

    def rows(self, source: ShardedDataset, samples: range) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yields ([b, k, d], [b, c, d], [b, c]) for batches of ``samples`` in order, with zeros for unusable ones."""
        most, size = num_captions(source), max(1, self.batch_size // self.views.count)
        for found in read_ahead(batches(samples, size), partial(self._read, source), self.threads):
            yield self._embed(found, most)

    def _facts(self, path: str, model: DualEncoder) -> dict[str, Any]:
        made_by: dict[str, Any] = {
            side: fingerprint(model.towers, model.preprocess, side, projected=True) for side in SIDES
        }
        return {"path": path, "width": model.embed_dim, "scale": model.head.logit_scale.exp().item(), **made_by}

    def _read(self, source: ShardedDataset, sample: int) -> Inputs | None:
        """None if the sample cannot be used."""
        try:
            raw = source.read(sample)
            key, made = source.key_hash(sample), dict[tuple[Any, ...], list[Tensor]]()
            for preprocess in (model.preprocess for model in self.models):
                if (kind := _kind(preprocess)) not in made:
                    numbers = [draws(self.views.seed, view, key) for view in range(self.views.count)]
                    made[kind] = [picture(raw.image, self.data, preprocess, one) for one in numbers]
        except Damaged:
            return None
        return [made[_kind(model.preprocess)] for model in self.models], raw.captions

    def _embed(self, found: list[Inputs | None], most: int) -> tuple[NDArray[Any], ...]:
        width, dtype = sum(one["width"] for one in self.teachers), DTYPES[self.storage]
        images = np.zeros((len(found), self.views.count, width), dtype)
        texts = np.zeros((len(found), most, width), dtype)
        groups = np.zeros((len(found), most), np.int64)
        usable = [(row, *one) for row, one in enumerate(found) if one is not None]
        owners = [row for row, _, captions in usable for _ in captions]
        places = [number for _, _, captions in usable for number in range(len(captions))]
        captions = [caption for _, _, captions in usable for caption in captions]
        groups[owners, places] = [hash_caption(caption) for caption in captions]
        start = 0
        for number, model in enumerate(self.models if usable else []):
            columns = slice(start, start + model.embed_dim)
            pixels = torch.stack([view for _, views, _ in usable for view in views[number]])
            made = self._in_batches(model.embed_images, pixels)
            images[[row for row, _, _ in usable], :, columns] = made.reshape(len(usable), self.views.count, -1)
            tokens, mask = model.preprocess.tokenize(captions)
            texts[owners, places, columns] = self._in_batches(model.embed_texts, tokens, mask)
            start = columns.stop
        return images, texts, groups

    def _in_batches(self, run: Callable[..., Tensor], *inputs: Tensor) -> NDArray[Any]:
        """[n, d] float32 in pieces of ``batch_size`` rows."""
        parts = zip(*(value.split(self.batch_size) for value in inputs), strict=True)
        with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
            made = [run(*(distributed.to_device(value, self.device) for value in part)) for part in parts]
        return torch.cat(made).float().cpu().numpy()


SIDES: tuple[Tower, ...] = ("image", "text")


def _kind(preprocess: Preprocess) -> tuple[Any, ...]:
    """Teachers that are equal in it read the same pixels."""
    return preprocess.image_size, preprocess.resize, preprocess.resample


def num_captions(source: ShardedDataset) -> int:
    """The largest number of captions of any sample: known from the manifest, or counted."""
    if not source.fields:
        return 1
    if source.fields == ["captions"] and "captions" not in source.columns:
        return source.dataset.max_captions
    if all(field in source.columns or field == "txt" for field in source.fields):
        return len(source.fields)
    return max(_count(source, sample) for sample in range(source.size))


def _count(source: ShardedDataset, sample: int) -> int:
    try:
        return len(source.captions(sample))
    except Damaged:
        return 1
