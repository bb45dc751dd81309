"""A teacher's embeddings of k views of every image and of all its captions, as side-car columns of a dataset: dataset
reinforcement (MobileCLIP, Vasu et al., arXiv 2311.17049, section 3.1).

    columns = TeacherColumns(source, "vitl", settings, preprocess)  # raises UserError where they do not fit
    columns.picture(image, sample=17, view=3, preprocess)           # the pixels of that view
    columns.read(sample=17, view=3, group=hash_caption(caption))    # [2 d]: of the view, and of the caption

``columns/NAME.npy`` [num_samples, k, d] are the views', ``NAME.texts.npy`` [num_samples, c, d] the captions', float16
or float32, normalised and of all teachers one after another; ``NAME.captions.npy`` [num_samples, c] int64 are the
captions' hashes, so that a text is never taken for another. A view's random numbers follow from the seed in the
manifest, the view and the sample's key: a filtered view of the dataset keeps them. A row of zeros is a sample that
could not be embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.format.index import Dataset, Strings
from trainer.core.types import Preprocess, UserError
from trainer.data.augment import NUM_DRAWS, picture
from trainer.data.datacompdr import STORED, NpzViews
from trainer.data.embedding_column import PartWriter, Storage, entry_of, save
from trainer.data.order import derive_key, uniforms
from trainer.data.settings import DataSettings
from trainer.data.sharded_dataset import ShardedDataset
from trainer.data.transforms import Damaged

PART_BYTES = 2**26
DTYPES: dict[Storage, type[Any]] = {"fp16": np.float16, "fp32": np.float32}


class StoredViews(Protocol):
    """A teacher's embeddings of one dataset and the views that they are of."""

    views: int
    """k: views of each image."""
    teachers: list[dict[str, Any]]
    """Of each: "path", "width", "scale", and what identifies it."""
    dtype: type[Any]
    whole_images: bool
    """Whether the only view is the whole image, without augmentation."""

    @property
    def widths(self) -> list[int]:
        """Numbers of each teacher's embeddings."""
        ...

    def check(self, sample: int) -> None:
        """Raises Damaged if the sample could not be embedded."""

    def read(self, sample: int, view: int, group: int) -> NDArray[Any]:
        """[2 d] embeddings of a view and of the caption whose hash is ``group``. Raises Damaged, UserError."""
        ...

    def picture(self, image: bytes, sample: int, view: int, preprocess: Preprocess) -> torch.Tensor:
        """The pixels of a view, as the student reads them. Raises Damaged."""
        ...


class TeacherColumns:
    """The side-car columns of one dataset. Raises UserError where they are missing, incomplete, or do not fit the
    settings."""

    def __init__(self, source: ShardedDataset, name: str, settings: DataSettings, preprocess: Preprocess) -> None:
        dataset = source.dataset
        self.source, self.settings = source, settings
        self.where = f"{dataset.root}: distill.stored {name!r}"
        entry = entry_of(dataset, name, f"{self.where} is")
        if "teachers" not in entry:
            raise UserError(
                f"{self.where} is a column without a teacher; name one that `python -m trainer.embed RECIPE` wrote for "
                "distill.stored"
            )
        self.teachers = entry["teachers"]
        self._check_settings(entry["views"], entry["captions"], preprocess)
        self.images, self.texts, self.groups = (_array(dataset, one, self.where) for one in names(name))
        self.views, self.dtype = int(entry["views"]["count"]), self.images.dtype.type
        self.whole_images = not settings.augment.active
        self.seed = int(entry["views"]["seed"])
        count, width = dataset.num_samples, sum(self.widths)
        shapes = [(count, self.views, width), (count, self.groups.shape[-1], width)]
        if [self.images.shape, self.texts.shape] != shapes or self.groups.shape[0] != count:
            raise UserError(
                f"{self.where} has views {list(self.images.shape)} and texts {list(self.texts.shape)}, but "
                f"{list(shapes[0])} and {list(shapes[1])} belong to this dataset, its {self.views} views and its "
                f"teachers; {AGAIN}"
            )
        if source.fields == ["captions"] and dataset.max_captions > self.groups.shape[1]:
            raise UserError(
                f"{self.where} has {self.groups.shape[1]} caption(s) of each sample, the dataset up to "
                f"{dataset.max_captions}; {AGAIN}"
            )

    @property
    def widths(self) -> list[int]:
        """As StoredViews."""
        return [int(one["width"]) for one in self.teachers]

    def check(self, sample: int) -> None:
        """As StoredViews."""
        if not self.images[sample, 0].any():
            raise Damaged("no stored embedding: the sample could not be used when they were computed")

    def read(self, sample: int, view: int, group: int) -> NDArray[Any]:
        """As StoredViews."""
        self.check(sample)
        found = np.flatnonzero(self.groups[sample] == group)
        if not found.size:
            raise UserError(
                f"{self.where} has no embedding of the caption drawn of {self.source.key(sample)}: its captions have "
                f"changed; {AGAIN}"
            )
        return np.concatenate([self.images[sample, view], self.texts[sample, found[0]]])

    def picture(self, image: bytes, sample: int, view: int, preprocess: Preprocess) -> torch.Tensor:
        """As StoredViews."""
        return picture(image, self.settings, preprocess, draws(self.seed, view, self.source.key_hash(sample)))

    def _check_settings(self, views: dict[str, Any], captions: list[str], preprocess: Preprocess) -> None:
        wanted = self.settings.augment.model_dump(mode="json")
        if views["augment"] != wanted:
            changed = next(key for key, value in wanted.items() if views["augment"].get(key) != value)
            raise UserError(
                f"{self.where} is of views with data.augment.{changed}={views['augment'].get(changed)}, the recipe "
                f"says {wanted[changed]}; {AGAIN}"
            )
        if views["resize"] != preprocess.resize:
            raise UserError(
                f"{self.where} is of a teacher whose images are resized by {views['resize']}, the student's by "
                f"{preprocess.resize}: take a teacher of the student's kind"
            )
        fields = self.source.fields or ["txt"]
        if any(field not in captions for field in fields):
            raise UserError(f"{self.where} is of the captions {captions}, data.caption asks for {fields}; {AGAIN}")


AGAIN = "write others with `python -m trainer.embed RECIPE distill.stored=ANOTHER_NAME`, or name the ones that fit"


def names(name: str) -> tuple[str, str, str]:
    """The three columns."""
    return name, f"{name}.texts", f"{name}.captions"


def draws(seed: int, view: int, key_hash: int) -> NDArray[np.float64]:
    """[NUM_DRAWS] the numbers in [0, 1) that make view ``view`` of the sample with this key."""
    return uniforms(derive_key(seed, "view", view), np.array([key_hash], np.uint64).view(np.int64), NUM_DRAWS)[0]


def open_stored(
    sources: Sequence[ShardedDataset], name: str, settings: DataSettings, preprocess: Preprocess
) -> list[StoredViews]:
    """The stored views of every dataset. Raises UserError where one does not fit, or they are of several teachers."""
    if settings.noise != type(settings.noise)():
        raise UserError("data.noise: a stored teacher has not seen spoiled pairs; remove data.noise or distill.stored")
    found: list[StoredViews] = [
        NpzViews(source, settings, preprocess) if name == STORED else TeacherColumns(source, name, settings, preprocess)
        for source in sources
    ]
    for source, one in zip(sources, found, strict=True):
        if one.teachers != found[0].teachers or one.dtype != found[0].dtype:
            raise UserError(
                f"{source.dataset.root}: distill.stored {name!r} is of other teachers, or stored in another dtype, "
                f"than that of {sources[0].dataset.root}; {AGAIN}"
            )
    return found


def _array(dataset: Dataset, name: str, where: str) -> NDArray[Any]:
    if name not in dataset.columns:
        raise UserError(f"{where}: the column {name!r} beside it is missing; {AGAIN}")
    values = dataset.column(name)
    assert not isinstance(values, Strings), "texts have no teacher"
    return values


class TeacherWriter(PartWriter):
    """Writes the three columns of one dataset; ``entry`` are the facts of the first, see TeacherColumns."""

    def __init__(self, dataset: Dataset, name: str, entry: dict[str, Any], num_captions: int, storage: Storage) -> None:
        if storage == "int8":
            raise UserError("--storage int8: a teacher's embeddings are stored as fp16 or fp32")
        super().__init__(dataset, name, [name, entry, num_captions, storage])
        self.entry, self.num_captions, self.dtype = entry, num_captions, DTYPES[storage]
        self.width = sum(int(one["width"]) for one in entry["teachers"])

    @property
    def rows(self) -> int:
        """As PartWriter; less where a sample has many views."""
        size = (int(self.entry["views"]["count"]) + self.num_captions) * self.width * np.dtype(self.dtype).itemsize
        return min(super().rows, max(1, PART_BYTES // size))

    def finished(self) -> bool:
        """As PartWriter."""
        entry = self.dataset.manifest.get("columns", {}).get(self.name)
        if entry is None:
            return False
        wanted = {**self.entry, "dtype": np.dtype(self.dtype).name}
        different = [key for key, value in wanted.items() if entry.get(key) != value]
        if different:
            raise UserError(
                f"{self.dataset.root}: the column {self.name!r} is there with other {', '.join(different)}; give "
                "these another name (distill.stored)"
            )
        return True

    def joined(self, empty: int) -> dict[str, dict[str, Any]]:
        """As PartWriter."""
        count, folder = self.dataset.num_samples, Path(self.dataset.root, "columns")
        views = int(self.entry["views"]["count"])
        kinds: list[tuple[list[int], type[Any], dict[str, Any]]] = [
            ([views, self.width], self.dtype, self.entry | {"side": "image", "empty": empty}),
            ([self.num_captions, self.width], self.dtype, {"side": "text"}),
            ([self.num_captions], np.int64, {"side": "text"}),
        ]
        entries = {}
        for number, (name, (shape, dtype, facts)) in enumerate(zip(names(self.name), kinds, strict=True)):
            pieces = (self.part(part, number) for part in range(self.num_parts))
            save(folder / f"{name}.npy", pieces, (count, *shape), dtype)
            entries[name] = {
                "file": f"columns/{name}.npy",
                "dtype": np.dtype(dtype).name,
                "shape": [count, *shape],
                **facts,
            }
        return entries
