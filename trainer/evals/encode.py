"""Embeds datasets and prompts on all ranks, with the same number of forward calls on each (ZeRO-3 gathers in every
call)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from trainer.core import collectives, distributed
from trainer.core.types import Embeddings, Preprocess, UserError
from trainer.data.order import Permutation, derive_key
from trainer.data.settings import DataSettings
from trainer.data.transforms import Damaged, decode, fit
from trainer.evals.examples import Examples
from trainer.evals.settings import EvalSettings


class Seen(NamedTuple):
    """One image, without its embedding."""

    sample: int
    look: str
    """Hash of the pixels as the model sees them."""
    captions: list[str]
    metadata: dict[str, Any]


@dataclass
class Pictures:
    """An embedded dataset, equal on all ranks."""

    examples: Examples
    seen: list[Seen]
    features: Tensor
    """[len(seen), d] float32, L2-normalised; identical images have identical rows."""
    damaged: dict[str, int] = field(default_factory=dict)
    """Number of unusable samples by reason."""
    max_pixels: int = DataSettings().max_pixels
    """The largest image that was decoded."""


class Wrapped(Protocol):
    """The part of ``trainer.engine.Engine`` that is used here: DeepSpeed's forward, and the model inside."""

    @property
    def module(self) -> nn.Module: ...

    def forward(self, pixels: Tensor | None, tokens: Tensor | None, token_mask: Tensor | None) -> Embeddings: ...


def chosen(examples: Examples, settings: EvalSettings) -> list[int]:
    """The samples to evaluate: the first ``limit`` of a seeded permutation."""
    limit = min(settings.limit or examples.size, examples.size)
    return Permutation(examples.size, derive_key(settings.seed, "evaluation"))(np.arange(limit)).tolist()


class Encoder:
    """Embeds with ``model``: a DualEncoder, or an engine around one, on this rank's device."""

    def __init__(
        self,
        model: nn.Module | Wrapped,
        settings: EvalSettings,
        preprocess: Preprocess,
        rank: int,
        world: int,
        max_pixels: int = DataSettings().max_pixels,
    ) -> None:
        self.max_pixels = max_pixels
        self.settings, self.preprocess, self.rank, self.world = settings, preprocess, rank, world
        self.forward = model if isinstance(model, nn.Module) else model.forward
        self.module = model if isinstance(model, nn.Module) else model.module
        self.device = distributed.device()
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """The model's temperature, from its last forward; with the bias it turns a cosine into a probability."""
        return 1.0 if self._last is None else float(self._last[0])

    @property
    def bias(self) -> float:
        """The model's bias, from its last forward."""
        return 0.0 if self._last is None else float(self._last[1])

    def pictures(self, examples: Examples) -> Pictures:
        """Embeds the first ``limit`` of a seeded permutation of ``examples``; damaged ones are counted and left out."""
        samples = chosen(examples, self.settings)
        share = -(-len(samples) // self.world)
        mine = samples[share * self.rank : share * (self.rank + 1)]
        seen: list[Seen | str] = []
        parts = []
        with self._inference(), ThreadPoolExecutor(_threads()) as pool:
            for start in range(0, share, self.settings.batch_size):
                # A rank that has finished its share continues with blank pictures: all ranks must call equally often.
                rows = min(self.settings.batch_size, share - start)
                pixels = torch.zeros(rows, 3, *self.preprocess.image_size, dtype=torch.uint8)
                batch = mine[start : start + rows]
                for row, (found, decoded) in enumerate(pool.map(lambda sample: self._read(examples, sample), batch)):
                    seen.append(found)
                    if decoded is not None:
                        pixels[row] = decoded
                parts.append(self._embed(pixels, None, None).image.float())
        examples.close()
        return self._join(examples, seen, self._gather(torch.cat(parts)), share)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """[len(captions), d] float32: each distinct caption is embedded once, by one rank."""
        distinct = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        share = -(-len(distinct) // self.world)
        mine = list(distinct)[share * self.rank : share * (self.rank + 1)]
        mine += [""] * (share - len(mine))
        parts = []
        with self._inference():
            for start in range(0, share, self.settings.batch_size):
                tokens, mask = self.preprocess.tokenize(mine[start : start + self.settings.batch_size])
                parts.append(self._embed(None, tokens, mask).text.float())
        features = self._gather(torch.cat(parts))
        return features[torch.tensor([distinct[caption] for caption in captions], device=features.device)]

    def _embed(self, *inputs: Tensor | None) -> Embeddings:
        z: Embeddings = self.forward(
            *(value if value is None else distributed.to_device(value, self.device) for value in inputs)
        )
        self._last = z.scale, z.bias
        return z

    def _read(self, examples: Examples, sample: int) -> tuple[Seen | str, Tensor | None]:
        try:
            example = examples.read(sample)
            pixels = fit(decode(example.image, self.max_pixels), self.preprocess).contiguous()
        except Damaged as error:
            return str(error), None
        return Seen(
            sample, xxhash.xxh3_128_hexdigest(pixels.numpy().tobytes()), example.captions, example.metadata
        ), pixels

    def _join(self, examples: Examples, mine: list[Seen | str], features: Tensor, share: int) -> Pictures:
        everyone: list[list[Seen | str]] = [mine]
        if self.world > 1:
            everyone = [[] for _ in range(self.world)]
            dist.all_gather_object(everyone, mine)
        damaged: dict[str, int] = {}
        seen: list[Seen] = []
        rows: list[int] = []
        first: dict[str, int] = {}
        for rank, part in enumerate(everyone):
            for row, found in enumerate(part):
                if isinstance(found, str):
                    damaged[found] = damaged.get(found, 0) + 1
                else:
                    seen.append(found)
                    rows.append(first.setdefault(found.look, rank * share + row))
        if not seen:
            raise UserError(
                f"{examples.path}: none of its {sum(damaged.values())} images can be used ({', '.join(damaged)})"
            )
        return Pictures(examples, seen, features[torch.tensor(rows, device=features.device)], damaged, self.max_pixels)

    def _gather(self, features: Tensor) -> Tensor:
        return collectives.stack_over_ranks(features.contiguous()).flatten(0, 1)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Within the block: no gradients, no dropout; restores every module's mode. (ZeRO-3 does not support
        inference_mode.)"""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training


def _threads() -> int:
    return min(16, distributed.cores())
