"""A model to search with: it embeds a dataset once, as columns beside the shards, and then what is typed or dropped.

model = SearchModel.open("runs/quickstart", source, batch_size=256)         # embeds what is not there yet
model.pictures.nearest(model.text("a red house"), 24)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from data_tools.format.index import Dataset, Strings
from trainer.core import distributed
from trainer.core.types import PrecomputedTower
from trainer.data.settings import DataSettings
from trainer.data.sharded_dataset import ShardedDataset
from trainer.data.transforms import decode, fit
from trainer.embed import Embedder, embed
from trainer.evaluate import find_recipe, load_model
from trainer.models import DualEncoder
from trainer.models.param_groups import Tower
from trainer.models.precomputed import fingerprint
from trainer.search.vectors import Vectors

Vector = NDArray[np.float32]
SIDES: tuple[Tower, Tower] = ("image", "text")
KEPT = 64
"""Queries whose embeddings are remembered: a filter that changes runs no tower."""


class WholeEmbedder(Embedder):
    """Embeddings as they are compared: a pair's projection included, and the first caption of a sample that has
    several."""

    def caption(self, source: ShardedDataset, sample: int) -> str:
        return source.captions(sample)[0]

    def output(self, *inputs: Tensor) -> Tensor:
        return self.model.embed_images(*inputs) if self.precomputed.side == "image" else self.model.embed_texts(*inputs)


@dataclass
class SearchModel:
    """One model with the vectors of one dataset. Any thread may ask; the towers run one query at a time."""

    name: str
    origin: str
    """Where its weights came from."""
    model: DualEncoder
    pictures: Vectors
    captions: Vectors
    max_pixels: int
    scale: float = 1.0
    bias: float = 0.0
    """0 where the loss had none: then a cosine by itself says nothing about a pair's probability."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: OrderedDict[str, Vector] = field(default_factory=OrderedDict)

    @classmethod
    def open(
        cls, where: str, source: ShardedDataset, data: DataSettings, batch_size: int, average: bool = False
    ) -> SearchModel:
        """Loads the model and maps its columns; makes those that are not there."""
        model, origin = load_model(where, average)
        pictures, captions = (_column(model, origin, source, data, side, batch_size) for side in SIDES)
        with torch.inference_mode():
            scale, bias = (float(value) for value in model.head())
        recipe = find_recipe(None, where)
        if recipe is not None and recipe.loss.name != "sigmoid":
            bias = 0.0  # it was there, and never trained
        return cls(where, origin, model, pictures, captions, data.max_pixels, scale, bias)

    def text(self, text: str) -> Vector:
        """[d], of length 1."""
        return self._remembered(f"text {text}", lambda: self.texts([text])[0])

    def texts(self, texts: list[str]) -> Vector:
        """[len(texts), d]."""
        tokens, mask = self.model.preprocess.tokenize(texts)
        return self._run(self.model.embed_texts, tokens, mask)

    def picture(self, data: bytes) -> Vector:
        """[d] for an encoded picture. Raises Damaged for one that cannot be used."""

        def run() -> Vector:
            return self._run(self.model.embed_images, fit(decode(data, self.max_pixels), self.model.preprocess)[None])[
                0
            ]

        return self._remembered(f"picture {xxhash.xxh3_128_hexdigest(data)}", run)

    def probabilities(self, cosines: Vector) -> dict[str, list[float]]:
        """Of one picture's cosines with labels [k]: softmax over them and, for a model with a bias, the sigmoid of
        each."""
        logits = torch.from_numpy(cosines) * self.scale + self.bias
        found = {"softmax": logits.softmax(0).tolist()}
        return found | ({"sigmoid": logits.sigmoid().tolist()} if self.bias else {})

    def _run(self, tower: Callable[..., Tensor], *inputs: Tensor) -> Vector:
        with self._lock, torch.inference_mode():
            device = distributed.device()
            return tower(*(distributed.to_device(value, device) for value in inputs)).float().cpu().numpy()

    def _remembered(self, key: str, make: Callable[[], Vector]) -> Vector:
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found


def _column(
    model: DualEncoder, origin: str, source: ShardedDataset, data: DataSettings, side: Tower, batch_size: int
) -> Vectors:
    """The vectors of one side, embedded now where they are not there yet."""
    made_by = fingerprint(model.towers, model.preprocess, side, projected=True)
    column = f"search-{made_by[:12]}-{side}"
    tower = PrecomputedTower(side, column, made_by, model.embed_dim)
    embed(WholeEmbedder(model, tower, data, batch_size, "fp32", origin), source, "fp16")
    dataset = Dataset.open(source.dataset.root)  # the manifest names the column now
    rows = dataset.column(column)
    assert not isinstance(rows, Strings)
    return Vectors(rows, empty=int(dataset.manifest["columns"][column]["empty"]), threads=distributed.cores())
