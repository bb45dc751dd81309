"""The ``data:`` section of a recipe."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_tools.format.expression import Expression
from trainer.core.distributed import cores
from trainer.core.settings import OPERATIONAL, Settings
from trainer.core.types import UserError

TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".json", ".jsonl")
"""Tables of pairs, which must be sharded first."""


def sharded(path: str) -> str:
    """``path``, which may hold shards. Raises UserError for a table of pairs and for a file that is not a tar."""
    table, local = path.lower().endswith(TABLES), Path(path).expanduser()
    if (table and not local.is_dir()) or (
        local.is_file() and not path.endswith(".tar") and not tarfile.is_tarfile(local)
    ):
        what = "a table of pairs" if table else "a file that is not a tar"
        raise UserError(
            f"{path} is {what}, but training reads shards: write them with `python -m data_tools shard {path} OUT`, "
            "and "
            f"name OUT"
        )
    return path


def condition(text: str | None) -> str | None:
    """A condition that can be understood. Raises UserError for another."""
    if text:
        Expression(text, "data.where")
    return text


class SourceSettings(Settings):
    """One dataset of a mixture."""

    path: str
    """Folder or fsspec URL of shards, a .tar, or a pattern such as tars/{000..099}.tar."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this dataset among the pairs drawn; given for every dataset or for none."""
    upsample: float = Field(default=1.0, gt=0)
    """How often an epoch draws each of its samples, if there are no weights; with 0.5, a sample is drawn every other
    epoch."""
    caption: str | list[str] | None = None
    """data.caption for this dataset only."""

    where: str | None = None
    """data.where for this dataset only."""

    _sharded = field_validator("path")(sharded)
    _condition = field_validator("where")(condition)

    @model_validator(mode="after")
    def _one_of_two(self) -> SourceSettings:
        if self.weight is not None and self.upsample != 1.0:
            raise ValueError("weight and upsample exclude each other: keep one")
        return self


class AugmentSettings(Settings):
    """Random changes to training images, drawn from (seed, sample position): the same with any number of ranks and
    workers."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: smallest and largest share of the image's area; (1, 1) is off, (0.9, 1) is CLIP's."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio of the crop: relative to the image's own if the model's preprocessing squashes, absolute if it
    crops."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a left-right flip. Not for captions with "left" or "right", or images of text."""
    randaugment: int = Field(default=0, ge=0, le=4)
    """How many light changes of colour, contrast or sharpness each image gets (RandAugment, arXiv 1909.13719, without
    geometry)."""
    magnitude: float = Field(default=0.3, ge=0, le=1)
    """Strength of each such change."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentSettings:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale is (least, most) with 0 < least <= most <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio is (least, most) with 0 < least <= most")
        return self

    @property
    def active(self) -> bool:
        """Whether any image may change."""
        return self.crops or self.flip > 0 or self.randaugment > 0

    @property
    def crops(self) -> bool:
        return self.crop_scale != (1.0, 1.0)


class NoiseSettings(Settings):
    """Pairs corrupted on purpose, to measure robustness (SigLIP, arXiv 2303.15343, figure 7), drawn from (seed, sample
    position): the same with any number of ranks and workers. Each step's counts are in log.jsonl."""

    image: float = Field(default=0.0, ge=0, le=1)
    """Share of images replaced by uniform noise."""
    text: float = Field(default=0.0, ge=0, le=1)
    """Share of captions replaced by random tokens, of a random length."""
    pairing: float = Field(default=0.0, ge=0, le=1)
    """Share of a global batch's pairs whose captions are exchanged among them, so that none keeps its own."""


class DataSettings(Settings):
    """Where pairs come from and how they are processed."""

    train: str | list[SourceSettings] = ""
    """Shards to train on: one path, or a list of {path, weight | upsample}."""
    validation: Annotated[str, OPERATIONAL] = ""
    """Shards to evaluate on during training."""
    caption: str | list[str] = "txt"
    """Captions of a pair: "txt" (all that the sample has), or fields of its .json or columns added by `data_tools
    join`. From several, one is drawn by (seed, sample position)."""
    where: str = ""
    """Train on the samples that meet this condition, such as "clip_score > 0.28 and width >= 128": comparisons, and,
    or, not, + - * /, numbers, texts in quotes, and names of columns beside the tars or width, height, min_side,
    aspect, image_bytes, caption_bytes, format. Empty: all. A sample without the value is left out."""
    workers: Annotated[int | Literal["auto"], OPERATIONAL] = "auto"
    """Processes per rank that read and decode; 0: a thread of the training process; auto: the node's cores divided by
    its ranks, less one. Unused if data.cache_decoded applies."""
    max_workers: Annotated[int, OPERATIONAL] = Field(default=8, ge=0)
    """Upper limit of `auto`."""
    prefetch: Annotated[int, OPERATIONAL] = Field(default=2, ge=1)
    """Batches prepared ahead of the one in use."""
    shuffle: Literal["auto", "full", "window"] = "auto"
    """full permutes all samples; window permutes shards and shuffles within data.window of them; auto: window for
    remote shards, else full."""
    window: int = Field(default=32, ge=1)
    """Number of shards that a windowed shuffle mixes."""
    augment: AugmentSettings = AugmentSettings()
    """Random changes to training images."""
    noise: NoiseSettings = NoiseSettings()
    """Pairs corrupted on purpose."""
    cache_decoded: Annotated[float, OPERATIONAL] = Field(default=1.0, ge=0)
    """GiB per rank: if all resized images fit and there is no augmentation, they are decoded once and kept; 0:
    never."""
    cache_dir: Annotated[str, OPERATIONAL] = "~/.cache/ringlip"
    """Local folder for remote shards and for indexes of tars that have none."""
    cache_limit: Annotated[float, OPERATIONAL] = Field(default=100.0, gt=0)
    """GiB of remote shards to keep in data.cache_dir, per node."""
    check_digests: Annotated[bool, OPERATIONAL] = True
    """Compare every image's bytes with the index (8 GB/s per core), so that a flipped bit counts as a damaged sample
    and never yields a wrong image."""
    jpeg_scaling: float = Field(default=0.0, ge=0)
    """If above 0, decode a JPEG at the smallest M/8 scale that is at least this many times the size needed: faster,
    with slightly different pixels."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Larger images count as damaged samples; the size is read from the header, before memory is allocated."""
    stall_seconds: Annotated[float, OPERATIONAL] = Field(default=300.0, gt=0)
    """If a worker is silent for this many seconds the run ends, and names the worker and the shard it was reading."""

    _condition = field_validator("where")(condition)

    @field_validator("train", "validation")
    @classmethod
    def _sharded(cls, value: str | list[SourceSettings]) -> str | list[SourceSettings]:
        return sharded(value) if isinstance(value, str) else value

    @field_validator("workers")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{value} processes are not possible: give 0 or more, or auto")
        return value

    @property
    def sources(self) -> list[SourceSettings]:
        """The training mixture as a list."""
        return [SourceSettings(path=self.train)] if isinstance(self.train, str) else self.train

    def num_workers(self) -> int:
        """Processes per rank; ``auto`` divides this node's cores among its ranks and leaves each rank one for the
        model."""
        if self.workers != "auto":
            return self.workers
        return max(0, min(self.max_workers, cores() - 1))
