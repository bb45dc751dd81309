"""Keeps small datasets decoded: resized pixels, tokens and groups stay in memory, and a batch is one gather.

Samples are decoded when first drawn. 50,000 images of 32 x 32 take 150 MB; a row then costs microseconds instead of a
decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.types import Preprocess
from trainer.data.augment import picture
from trainer.data.noise import Noise
from trainer.data.order import Ints, uniforms
from trainer.data.reader import Reader, Rows, Skip
from trainer.data.settings import DataSettings
from trainer.data.sharded_dataset import ShardedDataset, hash_caption
from trainer.data.stored_teacher import StoredViews
from trainer.data.transforms import Damaged

UNREAD, WHOLE, DAMAGED = 0, 1, 2
FEW = 64
NO_DRAWS = np.zeros(0)  # cached images are not augmented


def fits_memory(sources: Sequence[ShardedDataset], settings: DataSettings, preprocess: Preprocess) -> bool:
    """Whether all resized images fit in data.cache_decoded and there is no augmentation."""
    shape, dtype = Rows.shapes(sum(source.size for source in sources), preprocess)[0]
    need = math.prod(shape) * np.dtype(dtype).itemsize
    stored_texts = preprocess.precomputed is not None and preprocess.precomputed.side == "text"  # mapped as they are
    return not settings.augment.active and not stored_texts and need <= settings.cache_decoded * 2**30


class MemoryReader(Reader):
    """Like Reader, with the same rows for the same positions, but each sample is read and decoded only once."""

    def __init__(
        self,
        sources: Sequence[ShardedDataset],
        settings: DataSettings,
        preprocess: Preprocess,
        seed: int,
        noise: Noise | None = None,
        stored: Sequence[StoredViews] = (),
    ):
        super().__init__(sources, settings, preprocess, seed, noise, stored)
        count = int(self.first_ids[-1])
        self.state = np.zeros(count, np.uint8)
        shape, dtype = Rows.shapes(count, preprocess)[0]
        self.pixels: NDArray[Any] = np.empty(shape, dtype)
        self.first_caption = np.zeros(count, np.int64)
        self.num_captions = np.zeros(count, np.int64)
        self.texts = TextStore(preprocess.num_tokens)
        self.reasons: dict[int, Skip] = {}

    def fill(self, positions: Ints, rows: Rows) -> list[Skip]:
        """As Reader.fill."""
        sources, samples = self.order(positions)
        ids = self.first_ids[sources] + samples
        self._load(sources, samples, ids)
        skips: list[Skip] = []
        damaged = np.flatnonzero(self.state[ids] == DAMAGED)
        for row in damaged.tolist():
            ids[row] = self._replace(int(sources[row]), int(ids[row]), int(positions[row]), skips)
        choice = (uniforms(self.draw_key, positions, 1)[:, 0] * self.num_captions[ids]).astype(np.int64)
        np.take(self.pixels, ids, axis=0, out=rows.pixels, mode="clip")  # "raise" would go through a buffer
        self.texts.take(self.first_caption[ids] + choice, rows)
        rows.ids[:] = ids
        self._write_taught(rows)
        self.spoil(positions, rows)
        return skips

    def _write_taught(self, rows: Rows) -> None:
        """The teacher's embeddings of the only view of each image, and of the caption drawn."""
        if not self.stored:
            return
        sources = np.searchsorted(self.first_ids, rows.ids, side="right") - 1
        samples = rows.ids - self.first_ids[sources]
        for row, (source, sample) in enumerate(zip(sources.tolist(), samples.tolist(), strict=True)):
            rows.taught[row] = self.stored[source].read(sample, 0, int(rows.groups[row]))

    def _replace(self, source: int, number: int, position: int, skips: list[Skip]) -> int:
        attempt = 0
        while self.state[number] == DAMAGED:
            skips.append(self.reasons[number])
            self.check_attempts(attempt, source, skips[-1])
            sample = self.replacement(source, position, attempt)
            number = int(self.first_ids[source]) + sample
            self._load(np.array([source]), np.array([sample]), np.array([number]))
            attempt += 1
        return number

    def _load(self, sources: Ints, samples: Ints, ids: Ints) -> None:
        """Reads those of ``ids`` that have not been read; the captions of all of them are tokenized together."""
        captions: list[str] = []
        for row in np.flatnonzero(self.state[ids] == UNREAD).tolist():
            number = int(ids[row])
            if self.state[number] != UNREAD:
                continue  # appears twice in this batch
            source, sample = int(sources[row]), int(samples[row])
            try:
                if self.precomputed is not None:
                    self.pixels[number] = self.columns[source].read(sample)
                    found = self.sources[source].captions(sample)
                else:
                    image, found = self.sources[source].read(sample)
                    self.pixels[number] = picture(image, self.settings, self.preprocess, NO_DRAWS).numpy()
                    if self.stored:
                        self.stored[source].check(sample)
            except Damaged as error:
                self.state[number] = DAMAGED
                self.reasons[number] = Skip(self.sources[source].key(sample), str(error))
                continue
            self.first_caption[number] = self.texts.count + len(captions)
            self.num_captions[number] = len(found)
            captions += found
            self.state[number] = WHOLE
        if captions:
            tokens, mask = self.preprocess.tokenize(captions)
            self.texts.add(tokens.numpy(), mask.numpy(), [hash_caption(caption) for caption in captions])


class TextStore:
    """Tokens of many captions, growing; uint16 where the vocabulary fits."""

    def __init__(self, num_tokens: int):
        self.count = 0
        self.tokens: NDArray[Any] = np.empty((FEW, num_tokens), np.uint16)
        self.mask = np.empty((FEW, num_tokens), np.bool_)
        self.groups = np.empty(FEW, np.int64)

    def add(self, tokens: NDArray[np.int64], mask: NDArray[np.bool_], groups: list[int]) -> None:
        """Appends [c, n] tokens and mask and [c] groups."""
        end = self.count + len(groups)
        if self.tokens.dtype == np.uint16 and tokens.size and tokens.max() > np.iinfo(np.uint16).max:
            self.tokens = self.tokens.astype(np.int32)
        if end > len(self.groups):
            room = max(end, 2 * len(self.groups))
            self.tokens = np.resize(self.tokens, (room, self.tokens.shape[1]))
            self.mask = np.resize(self.mask, (room, self.mask.shape[1]))
            self.groups = np.resize(self.groups, room)
        self.tokens[self.count : end] = tokens
        self.mask[self.count : end] = mask
        self.groups[self.count : end] = groups
        self.count = end

    def take(self, which: Ints, rows: Rows) -> None:
        """Writes the captions ``which`` [b] into ``rows``."""
        rows.tokens[:] = self.tokens[which]
        rows.token_mask[:] = self.mask[which]
        rows.groups[:] = self.groups[which]
