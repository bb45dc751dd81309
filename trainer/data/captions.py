"""What the captions of a training set are like, before the first step: how many repeat, how many are cut.

    survey = survey_captions(recipe.data, model.preprocess)          # reads some thousand captions, no images
    survey.repeated(batch=1024), survey.cut

Captions alone are read, through the index: some thousand of them take a second.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_tools.io.permutation import Permutation
from trainer.core.types import Preprocess
from trainer.data.open import open_source
from trainer.data.order import draws_per_epoch
from trainer.data.reader import select_all, size_of
from trainer.data.settings import DataSettings
from trainer.data.transforms import Damaged

LOOKED_AT = 10_000


@dataclass(frozen=True)
class CaptionSurvey:
    """Of a random choice of captions, the same on every machine and at every start."""

    looked_at: int
    copies: dict[int, int]
    """How many captions occur k times among those looked at, by k."""
    cut: float | None
    """Share with more tokens than the model reads; None where the tokenizer does not tell."""
    longest: int
    """Tokens of the longest."""

    @property
    def distinct(self) -> int:
        """Different captions among those looked at."""
        return sum(self.copies.values())

    def repeated(self, batch: int) -> float:
        """Expected share of the pairs of a global batch whose caption is also another pair's."""
        if self.looked_at < 2:
            return 0.0
        others = self.looked_at - 1
        alone = sum(k * number * (1 - (k - 1) / others) ** (batch - 1) for k, number in self.copies.items())
        return 1 - alone / self.looked_at

    def as_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> CaptionSurvey:
        """What ``as_json`` gave."""
        return cls(**{**tree, "copies": {int(k): number for k, number in tree["copies"].items()}})


def survey_captions(settings: DataSettings, preprocess: Preprocess, count: int = LOOKED_AT) -> CaptionSurvey | None:
    """Looks at ``count`` captions of the training sets in the shares in which an epoch draws them; None where one of
    them is remote, whose shards would have to be fetched."""
    captions = sample_captions(settings, count)
    if not captions:
        return None
    lengths = getattr(preprocess.tokenize, "lengths", None)
    sizes = lengths(captions) if lengths is not None else []
    return CaptionSurvey(
        looked_at=len(captions),
        copies=dict(Counter(Counter(captions).values())),
        cut=sum(size > preprocess.num_tokens for size in sizes) / len(sizes) if sizes else None,
        longest=max(sizes, default=0),
    )


def sample_captions(settings: DataSettings, count: int) -> list[str]:
    """At most ``count`` training captions, one a sample; none where a set is remote. Unreadable ones are left out."""
    if any("://" in source.path for source in settings.sources):
        return []
    sources = [open_source(source, settings) for source in settings.sources]
    given, choices = settings.sources, select_all(sources, settings)
    sizes = [size_of(number, sources, choices) for number in range(len(sources))]
    draws = draws_per_epoch(sizes, [one.weight for one in given], [one.upsample for one in given])
    captions = []
    for number, (source, drawn) in enumerate(zip(sources, draws, strict=True)):
        size = min(sizes[number], max(1, round(count * drawn / sum(draws))))
        samples = np.sort(Permutation(sizes[number], key=0)(np.arange(size)))
        if number in choices:
            samples = choices[number].samples(np.zeros_like(samples), samples)
        for sample in samples.tolist():
            try:
                found = source.captions(sample)
            except Damaged:
                continue
            captions.append(found[sample % len(found)])
        source.close()
    return captions
