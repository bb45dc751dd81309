"""The order of samples, computed: sample position -> (source, sample), in O(1) memory for any number of samples.

    order = FullOrder(sizes=[1_000_000_000], draws=[1_000_000_000], seed=7)
    sources, samples = order(np.arange(4096))

A sample position is the number of a pair in the whole run (``samples_seen`` counts them), so a run resumes from one
integer with any number of ranks and workers. The permutations are computed, not stored (data_tools/io/permutation.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.io.permutation import Ints, Permutation, scramble
from trainer.core.types import UserError


def derive_key(*parts: int | str) -> int:
    """64 bits derived from all parts: the seed of a permutation or an augmentation."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def uniforms(key: int, positions: Ints, count: int) -> NDArray[np.float64]:
    """[b, count] numbers in [0, 1) that depend on (key, position) only, not on the rank or worker."""
    columns = scramble(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
    rows = scramble(positions.astype(np.uint64) + np.uint64(key ^ 0x5851F42D4C957F2D))
    return (scramble(rows[:, None] ^ columns[None, :]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draws_per_epoch(sizes: Sequence[int], weights: Sequence[float | None], upsamples: Sequence[float]) -> list[int]:
    """Number of pairs that an epoch draws from each source.

    With weights, an epoch is as long as all sources together and is divided in their proportion (largest remainders);
    otherwise a source of n samples contributes upsample * n. The next epoch continues in each source where the last one
    stopped, so over a run the samples of a source are drawn equally often, give or take one.
    """
    if any(weight is not None for weight in weights):
        if any(weight is None for weight in weights):
            raise UserError("data.train: give every source a weight, or none; add the missing ones, or use upsample")
        total, scale = sum(sizes), sum(weight for weight in weights if weight is not None)
        exact = [total * weight / scale for weight in weights if weight is not None]
        draws = [int(share) for share in exact]
        for index in sorted(range(len(sizes)), key=lambda i: draws[i] - exact[i])[: total - sum(draws)]:
            draws[index] += 1
    else:
        draws = [round(size * factor) for size, factor in zip(sizes, upsamples, strict=True)]
    if min(draws) < 1:
        raise UserError(
            f"data.train: an epoch would draw no pair from source {draws.index(min(draws))}; raise its weight or "
            "upsample"
        )
    return draws


class Order(Protocol):
    """Sample position -> (source, sample), the same on all ranks, without end."""

    epoch: int
    """Pairs in an epoch."""

    def chosen(self, cycles: Ints, sources: Ints, numbers: Ints) -> Ints:
        """[b] numbers among the samples chosen of ``sources``, in their cycles -> [b] samples."""
        ...

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """[b] sample positions -> ([b] source numbers, [b] sample numbers within their sources)."""
        ...


class Choice(Protocol):
    """A part of a source's samples: an order counts these alone."""

    size: int
    """How many a cycle through them has."""

    def starts(self, cycle: int) -> Ints:
        """[num_shards + 1]: the number of the first one in each shard and, last, the size."""
        ...

    def samples(self, cycles: Ints, numbers: Ints) -> Ints:
        """[b] numbers among them, in these cycles -> [b] samples of the source."""
        ...


class _Chosen:
    """The part of an order that knows which samples are chosen: none but those of ``choices``, by source."""

    choices: Mapping[int, Choice]

    def chosen(self, cycles: Ints, sources: Ints, numbers: Ints) -> Ints:
        """[b] numbers among the samples chosen of ``sources`` -> [b] samples."""
        samples = numbers.copy()
        for source, choice in self.choices.items():
            mask = sources == source
            samples[mask] = choice.samples(cycles[mask], numbers[mask])
        return samples


class FullOrder(_Chosen):
    """Every epoch permutes all samples: for local tars, where any sample costs one pread.

    ``sizes`` are those of ``choices``, where a source has one.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        draws: Sequence[int],
        seed: int,
        choices: Mapping[int, Choice] = MappingProxyType({}),
    ):
        self.choices = choices
        self.sizes, self.draws, self.seed = list(sizes), list(draws), seed
        self.ends = np.cumsum(draws, dtype=np.int64)
        self.epoch = int(self.ends[-1])

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        epochs = positions // self.epoch
        slots = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            slots[mask] = Permutation(self.epoch, derive_key(self.seed, "epoch", int(epoch)))(
                positions[mask] - epoch * self.epoch
            )
        sources = np.searchsorted(self.ends, slots, side="right")
        samples = np.empty_like(positions)
        for source in np.unique(sources):
            mask = sources == source
            draws = self.draws[source]
            samples[mask] = self._draw(int(source), epochs[mask] * draws + slots[mask] - (self.ends[source] - draws))
        return sources, self.chosen(epochs, sources, samples)

    def _draw(self, source: int, stream: Ints) -> Ints:
        """Samples of the source's endless stream, which cycles through all samples, in a new order each time."""
        size = self.sizes[source]
        if self.draws[source] == size:
            return stream % size  # the epoch's permutation shuffles it
        cycles, samples = stream // size, np.empty_like(stream)
        for cycle in np.unique(cycles):
            mask = cycles == cycle
            samples[mask] = Permutation(size, derive_key(self.seed, "source", source, int(cycle)))(
                stream[mask] - cycle * size
            )
        return samples


class Segments(NamedTuple):
    """One epoch of a windowed order: runs of consecutive samples, in reading order."""

    sources: Ints
    firsts: Ints
    ends: Ints
    """Cumulative lengths."""
    window_ends: Ints


class WindowOrder(_Chosen):
    """An epoch visits shards in a permuted order and shuffles within ``window`` of them: for remote shards behind a
    local cache.

    Memory grows with the number of shards (some 50 bytes each), not of samples. ``starts[i]`` has the first sample of
    each shard of source i and, last, the source's size; of one in ``choices``, its own starts count.
    """

    def __init__(
        self,
        starts: Sequence[Ints],
        draws: Sequence[int],
        seed: int,
        window: int,
        choices: Mapping[int, Choice] = MappingProxyType({}),
    ):
        self.choices = choices
        self.starts, self.draws, self.seed, self.window = list(starts), list(draws), seed, window
        self.epoch = sum(draws)
        self.segments = lru_cache(maxsize=2)(self._segments)

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        epochs = positions // self.epoch
        sources, samples = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            sources[mask], samples[mask] = self._in_epoch(int(epoch), positions[mask] - epoch * self.epoch)
        return sources, self.chosen(epochs, sources, samples)

    def _in_epoch(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        parts = self.segments(epoch)
        windows = np.searchsorted(parts.window_ends, slots, side="right")
        inside = np.empty_like(slots)
        for window in np.unique(windows):
            mask = windows == window
            start = int(parts.window_ends[window - 1]) if window else 0
            shuffle = Permutation(
                int(parts.window_ends[window]) - start, derive_key(self.seed, "window", epoch, int(window))
            )
            inside[mask] = shuffle(slots[mask] - start) + start
        which = np.searchsorted(parts.ends, inside, side="right")
        # ends - inside counts down from the segment's length: the sample is addressed from the segment's end
        return parts.sources[which], parts.firsts[which] + parts.ends[which] - inside - 1

    def windows_at(self, position: int, count: int) -> list[tuple[int, int]]:
        """(source, first sample) of every run of samples in the ``count`` windows from ``position`` on, to prefetch."""
        epoch, slot = divmod(position, self.epoch)
        runs: list[tuple[int, int]] = []
        window = int(np.searchsorted(self.segments(epoch).window_ends, slot, side="right"))
        for _ in range(count):
            if window == len(self.segments(epoch).window_ends):
                epoch, window = epoch + 1, 0
            parts = self.segments(epoch)
            span = slice(window * self.window, (window + 1) * self.window)
            sources, numbers = parts.sources[span], parts.firsts[span]
            firsts = self.chosen(np.full_like(numbers, epoch), sources, numbers)
            runs += zip(sources.tolist(), firsts.tolist(), strict=True)
            window += 1
        return runs

    def _segments(self, epoch: int) -> Segments:
        sources, firsts, lengths = [], [], []
        for source, draws in enumerate(self.draws):
            for first, length in self._runs(source, epoch * draws, (epoch + 1) * draws):
                sources.append(np.full(len(first), source, dtype=np.int64))
                firsts.append(first)
                lengths.append(length)
        order = np.concatenate(lengths).size
        shuffle = Permutation(order, derive_key(self.seed, "shards", epoch))(np.arange(order))
        ends = np.cumsum(np.concatenate(lengths)[shuffle])
        window_ends = np.append(ends[self.window - 1 : -1 : self.window], ends[-1])
        return Segments(np.concatenate(sources)[shuffle], np.concatenate(firsts)[shuffle], ends, window_ends)

    def _runs(self, source: int, begin: int, end: int) -> list[tuple[Ints, Ints]]:
        """Draws [begin, end) of the source's endless stream, as runs (first samples, lengths), cycle by cycle."""
        choice, runs = self.choices.get(source), []
        size = choice.size if choice else int(self.starts[source][-1])
        for cycle in range(begin // size, (end - 1) // size + 1):
            starts = choice.starts(cycle) if choice else self.starts[source]
            shards = Permutation(len(starts) - 1, derive_key(self.seed, "source", source, cycle))(
                np.arange(len(starts) - 1)
            )
            firsts, lengths = starts[shards], starts[shards + 1] - starts[shards]
            ends = np.cumsum(lengths)
            cut = np.clip(begin - cycle * size - (ends - lengths), 0, lengths)  # drawn in the epoch before
            kept = np.clip(end - cycle * size - (ends - lengths), 0, lengths) - cut
            runs.append(((firsts + cut)[kept > 0], kept[kept > 0]))
        return runs
