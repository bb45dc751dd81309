"""The nearest vectors against a float64 reference: uneven sizes, ties, rows without a vector, filters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.search import vectors as module
from trainer.search.vectors import Vectors


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BLOCK", 64)
    yield


def unit(dice: np.random.Generator, rows: int, width: int) -> NDArray[np.float16]:
    values = dice.standard_normal((rows, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def reference(rows: NDArray[np.float16], query: NDArray[np.float32], among: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Cosines in float64, -inf for what is no answer."""
    scores = rows.astype(np.float64) @ query.astype(np.float64)
    scores[~(among & rows.any(axis=1))] = -np.inf
    return scores


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (63, 17), (129, 40), (2000, 96)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_the_answers_are_those_of_float64(rows: int, width: int, share: float) -> None:
    dice = np.random.default_rng(rows)
    stored = unit(dice, rows, width)
    stored[dice.random(rows) < 0.1] = 0
    among = dice.random(rows) < share
    vectors = Vectors(stored, threads=2)
    for _ in range(4):
        query = unit(dice, 1, width)[0].astype(np.float32) + np.float32(1e-4) * dice.standard_normal(width).astype(
            np.float32
        )
        wanted = reference(stored, query, among)
        found = vectors.nearest(query, 10, None if share == 1.0 else among)
        if share == 1.0:
            wanted = reference(stored, query, np.ones(rows, bool))
        assert len(found.samples) == min(10, int(np.isfinite(wanted).sum()))
        np.testing.assert_allclose(wanted[found.samples], np.sort(wanted)[::-1][: len(found.samples)], atol=1e-6)
        np.testing.assert_allclose(found.scores, wanted[found.samples], atol=1e-6)


def test_rows_that_float16_cannot_tell_apart_are_ranked_by_float32() -> None:
    """2,000 rows whose cosines with the query are 0.01, but for some 1e-5: less than what rounding the query changes."""
    dice = np.random.default_rng(3)
    query = unit(dice, 1, 64)[0].astype(np.float32) + np.float32(3e-5) * dice.standard_normal(64).astype(np.float32)
    away = dice.standard_normal((2000, 64))
    away -= np.outer(away @ query, query) / (query @ query)
    stored = (
        away / np.linalg.norm(away, axis=1, keepdims=True) + np.outer(0.01 + 1e-5 * dice.random(2000), query)
    ).astype(np.float16)
    wanted = reference(stored, query, np.ones(2000, bool))
    found = Vectors(stored, empty=0).nearest(query, 20)
    np.testing.assert_allclose(wanted[found.samples], np.sort(wanted)[::-1][:20], atol=1e-7)


def test_equal_rows_come_in_the_order_of_their_numbers() -> None:
    stored = np.repeat(unit(np.random.default_rng(0), 1, 16), 150, axis=0)
    found = Vectors(stored).nearest(stored[0].astype(np.float32), 5)
    assert found.samples.tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_found_where_nothing_is_left() -> None:
    stored = unit(np.random.default_rng(0), 20, 8)
    query = stored[0].astype(np.float32)
    assert len(Vectors(stored).nearest(query, 5, np.zeros(20, bool)).samples) == 0
    assert len(Vectors(np.zeros((20, 8), np.float16)).nearest(query, 5).samples) == 0
