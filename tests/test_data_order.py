"""The order is a permutation, costs nothing to enter anywhere, and shuffles as well as chance does."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from trainer.core.types import UserError
from trainer.data.order import FullOrder, WindowOrder, draws_per_epoch, uniforms

BILLION = 1_000_000_000


def test_uniforms_depend_on_key_and_position_alone() -> None:
    draws = uniforms(3, np.arange(20_000), 4)
    assert np.array_equal(uniforms(3, np.arange(500, 600), 2), draws[500:600, :2])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert not np.array_equal(uniforms(4, np.arange(5), 4), draws[:5])


def make(kind: str, sizes: list[int], draws: list[int], seed: int = 3) -> FullOrder | WindowOrder:
    if kind == "full":
        return FullOrder(sizes, draws, seed)
    starts = [np.unique(np.append(np.arange(0, size, 7), size)) for size in sizes]
    return WindowOrder(starts, draws, seed, window=3)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_an_epoch_reads_every_sample_once(kind: str) -> None:
    order = make(kind, [50, 30], [50, 30])
    epochs = []
    for epoch in range(2):
        sources, samples = order(np.arange(80) + 80 * epoch)
        assert np.array_equal(np.sort(samples[sources == 0]), np.arange(50))
        assert np.array_equal(np.sort(samples[sources == 1]), np.arange(30))
        epochs.append(samples)
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_mixtures_are_exact_in_every_epoch_and_over_all(kind: str) -> None:
    order = make(kind, [50, 40], [75, 10])
    assert order.epoch == 85
    for epoch in range(4):
        sources, _ = order(np.arange(85) + 85 * epoch)
        assert np.bincount(sources).tolist() == [75, 10]
    sources, samples = order(np.arange(85 * 4))
    assert np.bincount(samples[sources == 0]).tolist() == [6] * 50  # 4 * 75 / 50
    assert np.bincount(samples[sources == 1]).tolist() == [1] * 40  # 4 * 10 / 40


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_batch_across_epochs_is_its_parts(kind: str) -> None:
    order = make(kind, [20, 9], [20, 27])
    whole = order(np.arange(300))
    for start in (0, 40, 46, 47, 90):
        part = order(np.arange(start, start + 60))
        assert np.array_equal(part[0], whole[0][start : start + 60]) and np.array_equal(
            part[1], whole[1][start : start + 60]
        )


def test_a_window_stays_within_its_shards() -> None:
    starts = np.arange(0, 1001, 10)
    order = WindowOrder([starts], [1000], seed=1, window=5)
    _, samples = order(np.arange(50))
    shards = sorted(set((samples // 10).tolist()))
    assert len(shards) == 5
    assert {first // 10 for _, first in order.windows_at(0, 1)} == set(shards)
    assert len(order.windows_at(975, 2)) == 10  # reaches into the next epoch


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_billion_samples_are_entered_anywhere_at_once(kind: str) -> None:
    starts = np.arange(0, BILLION + 1, 10_000)
    tracemalloc.start()
    began = time.perf_counter()
    order = FullOrder([BILLION], [BILLION], 7) if kind == "full" else WindowOrder([starts], [BILLION], 7, 32)
    for position in (0, 123_456_789, 3 * BILLION - 100):
        order(np.arange(position, position + 4096))
    seconds, memory = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 3.0, "less than a second for each of three positions"
    assert memory < 16 * 2**20


def test_batches_from_ordered_sources_are_as_mixed_as_chance_allows() -> None:
    order = FullOrder([100_000], [100_000], 2)
    kinds = [len(set((order(np.arange(256) + 256 * batch)[1] // 1000).tolist())) for batch in range(390)]
    assert np.mean(kinds) == pytest.approx(100 * (1 - 0.99**256), abs=0.5)
    assert np.mean(kinds) >= 90


def test_weights_share_an_epoch_out_exactly() -> None:
    assert draws_per_epoch([10, 90], [1.0, 1.0], [1, 1]) == [50, 50]
    draws = draws_per_epoch([10, 20, 31], [1.0, 2.0, 4.0], [1, 1, 1])
    assert sum(draws) == 61 and draws == [9, 17, 35]
    assert draws_per_epoch([10, 20], [None, None], [2.5, 0.5]) == [25, 10]


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match="give every source a weight"):
        draws_per_epoch([1, 1], [1.0, None], [1, 1])
    with pytest.raises(UserError, match="would draw no pair from source 1"):
        draws_per_epoch([10, 10], [1.0, 1e-9], [1, 1])
