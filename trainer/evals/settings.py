"""What the ``eval:`` section of a recipe sets."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from trainer.core.settings import Settings


class ZeroShotSettings(Settings):
    """One zero-shot classification."""

    label: str = "cls"
    """Field of each sample's .json that holds its class; "cls" is the class number of CLIP_benchmark's layout."""
    name: str = ""
    """What its metrics are called: NAME_top1, NAME_top5; the label when empty."""
    data: str = ""
    """Shards or CLIP_benchmark folder to classify; the first of eval.data when empty."""
    classes: str = ""
    """File with a class name a line; when empty classnames.txt beside the tars, else all values of the label that
    occur."""
    templates: list[str] = Field(default_factory=list)
    """Prompts, "{}" being the class and "{FIELD}" metadata; or sets (openai_imagenet, ...), or files; empty: the data's
    own, else {}."""
    accept: str = ""
    """Field with all the names that are true of a sample ("a|b" or a list), where its picture cannot tell them
    apart."""

    @property
    def title(self) -> str:
        """Prefix of its metrics."""
        return self.name or self.label


class EvalSettings(Settings):
    """Retrieval and zero-shot classification, during training and by ``python -m trainer.evaluate``."""

    data: list[str] = Field(default_factory=list)
    """Shards or CLIP_benchmark folders for retrieval, one or several; data.validation when empty."""
    by: str = ""
    """Field of each sample's .json, such as language: retrieval also among the samples of each of its values, and the
    mean of those."""
    zeroshot: list[ZeroShotSettings] = Field(default_factory=list)
    """Zero-shot classifications."""
    every: int = Field(default=0, ge=0)
    """Samples seen between evaluations during training; 0 evaluates at the end alone. With optim.ema they are of the
    averaged weights."""
    patience: int = Field(default=0, ge=0)
    """Evaluations in a row without a better checkpoint.best after which the run ends; 0: it goes on to run.samples."""
    limit: int = Field(default=1000, ge=0)
    """Pictures used of each dataset, the first of a seeded permutation; 0 uses all. Recall falls as this grows: compare
    like with like."""
    seed: int = 0
    """Seed of that permutation; the same pictures at every evaluation."""
    batch_size: int = Field(default=256, gt=0)
    """Pictures, or captions, that each rank embeds at once."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) and value else value or []

    @model_validator(mode="after")
    def _names_differ(self) -> EvalSettings:
        titles = [zeroshot.title for zeroshot in self.zeroshot]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"two zero-shot classifications are called {twice[0]!r}: give one a name of its own")
        return self
