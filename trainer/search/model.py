"""A model to search with: embeds a dataset once, as side-car columns, and then each query.

model = SearchModel.open("runs/quickstart", source, data, batch_size=256)   # computes the columns that are missing
model.pictures.nearest(model.text("a red house"), 24)
"""

from __future__ import annotations

import re
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
from trainer.models.vision_text import PAIR
from trainer.search.vectors import Vectors

Vector = NDArray[np.float32]
UNPADDED = ("clip", PAIR)
"""Families whose embedding does not depend on padding (causal attention, or a mask): a query of 5 tokens takes a tenth
of the time of 77. SigLIP attends to padding."""
SIDES: tuple[Tower, Tower] = ("image", "text")
SEARCH_COLUMN = re.compile(r"search-[0-9a-f]{12}-(image|text)")
"""Names of the columns; the digits are those of the tower's fingerprint."""
CACHED = 64
"""Queries whose embeddings are cached, so that a changed filter does not run a tower again."""


class WholeEmbedder(Embedder):
    """Embeds into the joint space, including the projection of a pair; of several captions it takes the first."""

    def caption(self, source: ShardedDataset, sample: int) -> str:
        return source.captions(sample)[0]

    def output(self, *inputs: Tensor) -> Tensor:
        return self.model.embed_images(*inputs) if self.precomputed.side == "image" else self.model.embed_texts(*inputs)


@dataclass
class SearchModel:
    """One model with its embeddings of one dataset. Thread-safe; the towers run one query at a time."""

    name: str
    origin: str
    """Where its weights came from."""
    model: DualEncoder
    columns: list[str]
    """Names of the side-car columns that hold ``pictures`` and ``captions``."""
    pictures: Vectors
    captions: Vectors
    max_pixels: int
    scale: float = 1.0
    bias: float = 0.0
    """0 if the loss has no bias: then a cosine alone does not give the probability of a pair."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cache: OrderedDict[str, Vector] = field(default_factory=OrderedDict)

    @classmethod
    def open(
        cls, where: str, source: ShardedDataset, data: DataSettings, batch_size: int, average: bool = False
    ) -> SearchModel:
        """Loads the model and maps its columns, after computing those that are missing."""
        model, origin = load_model(where, average)
        columns = [_column(model, origin, source, data, side, batch_size) for side in SIDES]
        pictures, captions = (_vectors(source.dataset.root, column) for column in columns)
        with torch.inference_mode():
            scale, bias = (float(value) for value in model.head())
        recipe = find_recipe(None, where)
        if recipe is not None and recipe.loss.name != "sigmoid":
            bias = 0.0  # present in the model, but the loss did not train it
        return cls(where, origin, model, columns, pictures, captions, data.max_pixels, scale, bias)

    def text(self, text: str) -> Vector:
        """[d], of length 1."""
        return self._cached(f"text {text}", lambda: self.texts([text])[0])

    def texts(self, texts: list[str]) -> Vector:
        """[len(texts), d]."""
        tokens, mask = self.model.preprocess.tokenize(texts)
        if self.model.family in UNPADDED:
            longest = int(mask.sum(dim=1).max())
            tokens, mask = tokens[:, :longest], mask[:, :longest]
        return self._run(self.model.embed_texts, tokens, mask)

    def picture(self, data: bytes) -> Vector:
        """[d] for the bytes of an image file. Raises Damaged if it cannot be decoded."""

        def run() -> Vector:
            return self._run(self.model.embed_images, fit(decode(data, self.max_pixels), self.model.preprocess)[None])[
                0
            ]

        return self._cached(f"image {xxhash.xxh3_128_hexdigest(data)}", run)

    def probabilities(self, cosines: Vector) -> dict[str, list[float]]:
        """From the cosines [k] of one image with k labels: softmax over the labels and, for a model with a bias, the
        sigmoid of each."""
        logits = torch.from_numpy(cosines) * self.scale + self.bias
        found = {"softmax": logits.softmax(0).tolist()}
        return found | ({"sigmoid": logits.sigmoid().tolist()} if self.bias else {})

    def _run(self, tower: Callable[..., Tensor], *inputs: Tensor) -> Vector:
        with self._lock, torch.inference_mode():
            device = distributed.device()
            return tower(*(distributed.to_device(value, device) for value in inputs)).float().cpu().numpy()

    def _cached(self, key: str, make: Callable[[], Vector]) -> Vector:
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = make()
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return found


def _column(
    model: DualEncoder, origin: str, source: ShardedDataset, data: DataSettings, side: Tower, batch_size: int
) -> str:
    """The name of one side's column, which is computed here if it is missing."""
    made_by = fingerprint(model.towers, model.preprocess, side, projected=True)
    column = f"search-{made_by[:12]}-{side}"
    tower = PrecomputedTower(side, column, made_by, model.embed_dim)
    embed(WholeEmbedder(model, tower, data, batch_size, "fp32", origin), source)
    return column


def _vectors(root: str, column: str) -> Vectors:
    dataset = Dataset.open(root)  # opened again: its manifest names the new column
    rows = dataset.column(column)
    assert not isinstance(rows, Strings)
    return Vectors(rows, empty=int(dataset.manifest["columns"][column]["empty"]), threads=distributed.cores())
