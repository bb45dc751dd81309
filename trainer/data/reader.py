"""Turns sample positions into rows of a batch: chooses sample, caption and augmentation, and replaces damaged
samples.

A reader is a pure function of (settings, seed, positions). Ranks, workers, chunks and caches only decide where it is
called, so they never change a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.core.types import Preprocess, UserError
from trainer.data.augment import NUM_DRAWS, VIEW, picture
from trainer.data.embedding_column import PrecomputedColumn
from trainer.data.noise import Noise
from trainer.data.order import FullOrder, Ints, Order, WindowOrder, derive_key, draws_per_epoch, uniforms
from trainer.data.selection import Selection
from trainer.data.settings import DataSettings
from trainer.data.sharded_dataset import ShardedDataset, hash_caption
from trainer.data.stored_teacher import StoredViews
from trainer.data.transforms import Damaged

ATTEMPTS = 100
"""Replacements to try for one damaged sample before the run ends."""
KEPT_KEYS = 1000


class Rows(NamedTuple):
    """Arrays that a reader fills, all with the same number of rows b."""

    pixels: NDArray[Any]
    """[b, 3, h, w] uint8, or [b, k] float16 where image embeddings are stored"""
    tokens: NDArray[Any]
    """[b, n], or [b, k] float16 where text embeddings are stored"""
    token_mask: NDArray[np.bool_]
    """[b, n]"""
    ids: Ints
    """[b] number of the sample over all sources, in their order."""
    groups: Ints
    """[b] xxh3_64 of the caption."""
    taught: NDArray[Any]
    """[b, 2 d] a stored teacher's embeddings of the view and of the caption; [b, 0] without."""

    @classmethod
    def shapes(
        cls, rows: int, preprocess: Preprocess, stored: Sequence[StoredViews] = ()
    ) -> list[tuple[tuple[int, ...], type[Any]]]:
        """Shape and dtype of each array."""
        tokens, precomputed = (rows, preprocess.num_tokens), preprocess.precomputed
        side = precomputed.side if precomputed else None
        embedding: tuple[tuple[int, ...], type[Any]] = ((rows, precomputed.width if precomputed else 0), np.float16)
        return [
            embedding if side == "image" else ((rows, 3, *preprocess.image_size), np.uint8),
            embedding if side == "text" else (tokens, np.int32),
            (tokens, np.bool_),
            ((rows,), np.int64),
            ((rows,), np.int64),
            ((rows, 2 * sum(stored[0].widths)), stored[0].dtype) if stored else ((rows, 0), np.float16),
        ]


class Skip(NamedTuple):
    """A damaged sample that was replaced."""

    key: str
    reason: str


@dataclass
class SkippedSamples:
    """Damaged samples found so far on this rank; saved in checkpoints."""

    count: int = 0
    keys: list[str] = field(default_factory=list)
    """TAR:KEY of the first thousand different ones."""
    reasons: dict[str, int] = field(default_factory=Counter)

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Records ``skips`` and returns those whose key is new."""
        new = []
        for skip in skips:
            self.count += 1
            self.reasons[skip.reason] = self.reasons.get(skip.reason, 0) + 1
            if len(self.keys) < KEPT_KEYS and skip.key not in self.keys:
                self.keys.append(skip.key)
                new.append(skip)
        return new


class Reader:
    """Fills rows for positions, reading and decoding samples on demand."""

    def __init__(
        self,
        sources: Sequence[ShardedDataset],
        settings: DataSettings,
        preprocess: Preprocess,
        seed: int,
        noise: Noise | None = None,
        stored: Sequence[StoredViews] = (),
    ):
        self.noise, self.stored = noise, stored
        self.sources, self.settings, self.preprocess, self.seed = list(sources), settings, preprocess, seed
        self.choices = select_all(self.sources, settings)
        self.order = make_order(self.sources, self.choices, settings, seed)
        self.first_ids = np.cumsum([0] + [source.size for source in self.sources])
        self.draw_key = derive_key(seed, "augment")
        self.precomputed = preprocess.precomputed
        if self.precomputed is not None and self.precomputed.side == "image" and settings.augment.active:
            raise UserError(
                "data.augment: stored image embeddings are of the whole images, without augmentation; remove it, or "
                "model.precomputed"
            )
        self.columns = (
            [PrecomputedColumn(source.dataset, self.precomputed, source.fields) for source in self.sources]
            if self.precomputed
            else []
        )

    def shapes(self, rows: int) -> list[tuple[tuple[int, ...], type[Any]]]:
        """Shape and dtype of each array of ``rows`` rows."""
        return Rows.shapes(rows, self.preprocess, self.stored)

    def fill(self, positions: Ints, rows: Rows) -> list[Skip]:
        """Writes the samples at ``positions`` [b] into ``rows``; returns the damaged ones that were replaced. Raises
        UserError, never Damaged."""
        sources, samples = self.order(positions)
        draws = uniforms(self.draw_key, positions, NUM_DRAWS)
        captions, skips = [], []
        for row, position in enumerate(positions.tolist()):
            source, sample = int(sources[row]), int(samples[row])
            for attempt in range(ATTEMPTS + 1):
                try:
                    caption = self._sample(source, sample, draws[row], rows, row)
                    break
                except Damaged as error:
                    skips.append(Skip(self.sources[source].key(sample), str(error)))
                    self.check_attempts(attempt, source, skips[-1])
                    sample = self.replacement(source, position, attempt)
            captions.append(caption)
            rows.ids[row] = self.first_ids[source] + sample
        self.write_text(captions, rows)
        self.spoil(positions, rows)
        return skips

    def spoil(self, positions: Ints, rows: Rows) -> None:
        """Applies ``data.noise`` to finished rows: captions change places, then noise takes that of captions and
        images."""
        noise = self.noise
        if noise is None:
            return
        partners = noise.partners(positions)
        if (moved := np.flatnonzero(partners != positions)).size:
            self._write_captions_of(partners[moved], moved, rows)
        if (which := np.flatnonzero(noise.noisy("text", positions))).size:
            rows.tokens[which], rows.token_mask[which], rows.groups[which] = noise.captions(positions[which])
        for row in np.flatnonzero(noise.noisy("image", positions)).tolist():
            rows.pixels[row] = noise.image(int(positions[row]), rows.pixels[row])

    def _write_captions_of(self, positions: Ints, where: Ints, rows: Rows) -> None:
        """Writes the captions drawn at ``positions`` into the rows ``where``, without reading images."""
        sources, samples = self.order(positions)
        draws = uniforms(self.draw_key, positions, 1)[:, 0]
        stored = self.precomputed is not None and self.precomputed.side == "text"
        captions = []
        for row, source, sample, draw, position in zip(where, sources, samples, draws, positions, strict=True):
            for attempt in range(ATTEMPTS + 1):
                try:
                    if stored:
                        rows.tokens[row] = self.columns[source].read(int(sample))
                    found = self.sources[source].captions(int(sample))
                    break
                except Damaged as error:  # counted where its own pair is read
                    self.check_attempts(attempt, int(source), Skip(self.sources[source].key(int(sample)), str(error)))
                    sample = self.replacement(int(source), int(position), attempt)
            captions.append(found[int(draw * len(found))])
        if not stored:
            tokens, mask = self.preprocess.tokenize(captions)
            rows.tokens[where], rows.token_mask[where] = tokens.numpy(), mask.numpy()
        rows.groups[where] = [hash_caption(caption) for caption in captions]

    def _sample(self, source: int, sample: int, draws: NDArray[np.float64], rows: Rows, row: int) -> str:
        side = self.precomputed.side if self.precomputed else None
        if side is not None:
            (rows.pixels if side == "image" else rows.tokens)[row] = self.columns[source].read(sample)
        if side == "image":
            captions = self.sources[source].captions(sample)
        else:
            raw = self.sources[source].read(sample)
            captions = raw.captions
        caption = captions[int(draws[0] * len(captions))]
        if self.stored:
            stored = self.stored[source]
            view = int(draws[VIEW] * stored.views)
            rows.taught[row] = stored.read(sample, view, hash_caption(caption))
            rows.pixels[row] = stored.picture(raw.image, sample, view, self.preprocess).numpy()
        elif side != "image":
            rows.pixels[row] = picture(raw.image, self.settings, self.preprocess, draws).numpy()
        return caption

    def write_text(self, captions: list[str], rows: Rows) -> None:
        """Writes tokens, mask and groups of ``captions`` into the first rows."""
        if self.precomputed is not None and self.precomputed.side == "text":
            rows.token_mask[: len(captions)] = True
        else:
            tokens, mask = self.preprocess.tokenize(captions)
            rows.tokens[: len(captions)] = tokens.numpy()
            rows.token_mask[: len(captions)] = mask.numpy()
        rows.groups[: len(captions)] = [hash_caption(caption) for caption in captions]

    def replacement(self, source: int, position: int, attempt: int) -> int:
        """The sample that replaces the one at ``position`` after ``attempt`` + 1 damaged ones; the same on every
        rank."""
        number = derive_key(self.seed, "replacement", position, attempt) % size_of(source, self.sources, self.choices)
        cycle = position // self.order.epoch
        return int(self.order.chosen(*(np.array([one], np.int64) for one in (cycle, source, number)))[0])

    def check_attempts(self, attempt: int, source: int, last: Skip) -> None:
        """Raises UserError after too many damaged samples in a row."""
        if attempt >= ATTEMPTS:
            root = self.sources[source].dataset.root
            remedy = f"run `python -m data_tools verify {root}`, and check data.caption"
            raise UserError(
                f"{root}: {attempt + 1} samples in a row cannot be used, the last {last.key}: {last.reason}; {remedy}"
            )

    def remote_shards(self, position: int) -> list[str]:
        """URLs of the shards read from ``position`` on, in this window of the order and the next; empty if all are
        local."""
        if not isinstance(self.order, WindowOrder) or all(source.cache is None for source in self.sources):
            return []
        runs = self.order.windows_at(position, 2)
        return list(
            dict.fromkeys(
                self.sources[source].shard_name(first) for source, first in runs if self.sources[source].cache
            )
        )

    def fetch(self, url: str) -> str:
        """Brings a remote shard to local disk."""
        return next(source.cache for source in self.sources if source.cache).fetch(url)

    @property
    def selection(self) -> str:
        """Identifies the samples that data.where selects; empty if it selects all."""
        return " ".join(f"{source}:{choice.digest}" for source, choice in self.choices.items())

    def keys(self, ids: Iterable[int]) -> list[str]:
        """TAR:KEY of samples by ``Batch.ids``, to inspect after a bad step."""
        found = []
        for number in ids:
            source = int(np.searchsorted(self.first_ids, number, side="right")) - 1
            found.append(self.sources[source].key(int(number - self.first_ids[source])))
        return found

    def describe(self, positions: Ints) -> str:
        """The shards with the samples at ``positions``, for messages about a worker that stopped."""
        pairs = zip(*self.order(positions), strict=True)
        names = dict.fromkeys(self.sources[source].shard_name(int(sample)) for source, sample in pairs)
        listed = list(names)
        return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def make_order(
    sources: Sequence[ShardedDataset], choices: dict[int, Selection], settings: DataSettings, seed: int
) -> Order:
    """The order of the whole run over what is chosen of all sources, as the settings ask."""
    given = settings.sources
    sizes = [size_of(source, sources, choices) for source in range(len(sources))]
    draws = draws_per_epoch(sizes, [one.weight for one in given], [one.upsample for one in given])
    remote = any(source.cache is not None for source in sources)
    if remote:
        check_window(sources, settings)
    if settings.shuffle == "window" or (settings.shuffle == "auto" and remote):
        return WindowOrder([source.dataset.counts for source in sources], draws, seed, settings.window, choices)
    return FullOrder(sizes, draws, seed, choices)


def select_all(sources: Sequence[ShardedDataset], settings: DataSettings) -> dict[int, Selection]:
    """Source number -> what data.where selects of it, for the sources that have a condition."""
    wheres = [settings.where if one.where is None else one.where for one in settings.sources]
    pairs = enumerate(zip(sources, wheres, strict=True))
    return {number: Selection(source.dataset, where) for number, (source, where) in pairs if where}


def size_of(source: int, sources: Sequence[ShardedDataset], choices: dict[int, Selection]) -> int:
    """How many samples of a source are drawn."""
    return choices[source].size if source in choices else sources[source].size


def check_window(sources: Sequence[ShardedDataset], settings: DataSettings) -> None:
    """Raises UserError if the shards of two windows do not fit in the cache: each would be fetched again and again."""
    sizes = [entry.get("bytes", 0) for source in sources if source.cache for entry in source.dataset.manifest["shards"]]
    need = sum(sorted(sizes)[-2 * settings.window :])
    if need > settings.cache_limit * 2**30:
        raise UserError(
            f"data.cache_limit: {settings.cache_limit:g} GiB is less than two windows of {settings.window} shards "
            f"({need / 2**30:.2f} GiB); raise it, or lower data.window"
        )
