"""The ``eval:`` section of a recipe."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from trainer.core.settings import Settings


class ZeroShotSettings(Settings):
    """One zero-shot classification."""

    label: str = "cls"
    """Field of each sample's .json that holds its class; "cls" is the class number of CLIP_benchmark's layout."""
    name: str = ""
    """Names its metrics: NAME_top1, NAME_top5; default: the label."""
    data: str = ""
    """Shards or CLIP_benchmark folder to classify; the first of eval.data when empty."""
    classes: str = ""
    """File with one class name per line; default: classnames.txt beside the tars, else all values of the label."""
    templates: list[str] = Field(default_factory=list)
    """Prompts, with "{}" for the class and "{FIELD}" for metadata; or sets (openai_imagenet, ...), or files; default:
    the dataset's own, else {}."""
    accept: str = ""
    """Field with all right class names of a sample ("a|b" or a list), if its image does not tell which one it is."""

    @property
    def title(self) -> str:
        """Prefix of its metrics."""
        return self.name or self.label


class EvalSettings(Settings):
    """Retrieval and zero-shot classification, during training and by ``python -m trainer.evaluate``."""

    data: list[str] = Field(default_factory=list)
    """Shards or CLIP_benchmark folders for retrieval, one or several; data.validation when empty."""
    by: str = ""
    """Field of each sample's .json, such as language: also evaluate retrieval within each of its values, and their
    mean."""
    zeroshot: list[ZeroShotSettings] = Field(default_factory=list)
    """Zero-shot classifications."""
    every: int = Field(default=0, ge=0)
    """Samples seen between evaluations during training; 0: only at the end. With optim.ema, the averaged weights are
    evaluated."""
    patience: int = Field(default=0, ge=0)
    """End the run after this many evaluations in a row that do not improve checkpoint.best; 0: never."""
    limit: int = Field(default=1000, ge=0)
    """Number of images per dataset, the first of a seeded permutation; 0: all. Recall falls as this grows, so compare
    only equal numbers."""
    seed: int = 0
    """Seed of that permutation; the same images at every evaluation."""
    batch_size: int = Field(default=256, gt=0)
    """Images, or captions, that each rank embeds at once."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) and value else value or []

    @model_validator(mode="after")
    def _names_differ(self) -> EvalSettings:
        titles = [zeroshot.title for zeroshot in self.zeroshot]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"two zero-shot classifications are called {twice[0]!r}: give one of them a name")
        return self
