"""Answers to the page's requests: search results, a sample's metadata, zero-shot labels. server.py adds HTTP.

library = Library(source, [SearchModel.open("runs/a", source)])
library.search(Query(text="a red house"), model=0, kind="pictures", count=24)
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.core.types import UserError
from trainer.data.sharded_dataset import ShardedDataset
from trainer.data.transforms import Damaged, decode
from trainer.search.fields import Fields
from trainer.search.model import SearchModel, Vector

Kind = Literal["pictures", "captions"]
MOST = 500
"""Most results of a query."""
LOOKED_AT = 50
"""Samples whose .json members give the names of the fields."""


@dataclass(frozen=True)
class Query:
    """Words, the bytes of an image file or a sample of the dataset. Empty: evenly spaced samples are shown."""

    text: str = ""
    picture: bytes = b""
    sample: int | None = None


class Library:
    """A dataset and one or several models."""

    def __init__(self, source: ShardedDataset, models: list[SearchModel]) -> None:
        self.source, self.models, self.size = source, models, source.size
        self.fields = Fields(source.dataset, self._field_names())
        self.thumbnail = lru_cache(maxsize=2048)(self._thumbnail)

    def warm_up(self) -> None:
        """Reads the columns and runs each text tower once, so that the first query is as fast as the next."""
        for number in range(len(self.models)):
            for kind in get_args(Kind):
                self.search(Query(text="a"), number, kind, 1)

    def about(self) -> dict[str, Any]:
        """The models and the dataset."""
        models = [{"name": m.name, "origin": m.origin, "bias": bool(m.bias)} for m in self.models]
        data = {"name": self.source.dataset.root, "samples": self.size, "fields": self.fields.names}
        return {"models": models, "data": data}

    def search(
        self, query: Query, model: int, kind: Kind, count: int, filters: tuple[tuple[str, str], ...] = ()
    ) -> dict[str, Any]:
        """The nearest images or captions with their cosines; for an image and a text, by a model with a bias, also
        the probability that they match."""
        among: NDArray[np.bool_] | None = None
        for name, value in filters:
            mask = self.fields.mask(name, value)
            among = mask if among is None else among & mask
        total = self.size if among is None else int(among.sum())
        count = min(count, MOST)
        vector = self._vector(query, model)
        if vector is None:
            there = np.arange(self.size) if among is None else np.flatnonzero(among)
            shown = there[np.linspace(0, len(there) - 1, min(count, len(there))).astype(np.int64)]
            return {"total": total, "results": [self._result(int(sample)) for sample in shown]}
        chosen = self.models[model]
        found = (chosen.pictures if kind == "pictures" else chosen.captions).nearest(vector, count, among)
        across = bool(chosen.bias) and bool(query.text) == (kind == "pictures")
        likely = 1 / (1 + np.exp(-(chosen.scale * found.scores + chosen.bias))) if across else found.scores
        results = [
            self._result(int(sample)) | {"score": float(score)} | ({"probability": float(share)} if across else {})
            for sample, score, share in zip(found.samples, found.scores, likely, strict=True)
        ]
        return {"total": total, "results": results}

    def sample(self, sample: int) -> dict[str, Any]:
        """Key, captions and metadata of a sample."""
        self._check(sample)
        try:
            metadata = self.source.metadata(sample)
        except Damaged as error:
            metadata = {"(not readable)": str(error)}
        return {"sample": sample, "key": self.source.key(sample), "captions": self._captions(sample)} | {
            "metadata": metadata
        }

    def labels(self, query: Query, model: int, labels: list[str], template: str) -> list[dict[str, Any]]:
        """Zero-shot classification of an image: cosine and probabilities of each label, best first."""
        vector = self._vector(query, model)
        if vector is None or query.text:
            raise UserError("labels are for an image: drop one or click one")
        chosen = self.models[model]
        texts = [template.replace("{}", label) if "{}" in template else f"{template}{label}" for label in labels]
        cosines = chosen.texts(texts) @ vector
        shares = chosen.probabilities(cosines)
        rows = [
            {"label": label, "score": float(cosine)} | {name: values[row] for name, values in shares.items()}
            for row, (label, cosine) in enumerate(zip(labels, cosines, strict=True))
        ]
        return sorted(rows, key=lambda row: -row["score"])

    def _thumbnail(self, sample: int, side: int) -> tuple[bytes, str]:
        """An image of at most ``side`` pixels per side and its media type. It is encoded again: the browser never gets
        stored bytes. Raises Damaged."""
        self._check(sample)
        image = Image.fromarray(decode(self.source.picture(sample), self.models[0].max_pixels, (side, side)))
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        tiny = max(image.size) <= 96  # the page shows its pixels as squares, which JPEG would blur
        image.save(buffer, "PNG" if tiny else "JPEG", quality=88)
        return buffer.getvalue(), "image/png" if tiny else "image/jpeg"

    def _vector(self, query: Query, model: int) -> Vector | None:
        chosen = self.models[model]
        if query.sample is not None:
            self._check(query.sample)
            row = chosen.pictures.row(query.sample)
            if not row.any():
                raise UserError(f"sample {query.sample}: its image could not be decoded, so it has no embedding")
            return row
        if query.picture:
            return chosen.picture(query.picture)
        return chosen.text(query.text) if query.text else None

    def _result(self, sample: int) -> dict[str, Any]:
        captions = self._captions(sample)
        return {"sample": sample, "caption": captions[0] if captions else ""}

    def _captions(self, sample: int) -> list[str]:
        try:
            return self.source.captions(sample)
        except Damaged:
            return []

    def _check(self, sample: int) -> None:
        if not 0 <= sample < self.size:
            raise UserError(f"sample {sample}: not in the dataset, which has 0 to {self.size - 1}")

    def _field_names(self) -> list[str]:
        found: dict[str, None] = {}
        for sample in np.linspace(0, self.size - 1, min(LOOKED_AT, self.size)).astype(int).tolist():
            try:
                found |= dict.fromkeys(self.source.metadata(sample))
            except Damaged:
                continue
        return [name for name in found if name not in ("captions", "sample")]
