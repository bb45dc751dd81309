"""A permutation visits everything once, shuffles as well as chance does, and gives the same numbers for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.io.permutation import Permutation


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_visits_everything_once(size: int, key: int) -> None:
    images = Permutation(size, key)(np.arange(size))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))


def test_positions_can_be_asked_in_any_grouping() -> None:
    shuffle = Permutation(1000, 9)
    whole = shuffle(np.arange(1000))
    assert np.array_equal(np.concatenate([shuffle(np.arange(i, i + 8)) for i in range(0, 1000, 8)]), whole)


def test_first_images_are_uniform_over_keys() -> None:
    counts = np.bincount(
        [int(Permutation(10, key * 0x9E3779B9)(np.array([0]))[0]) for key in range(4000)], minlength=10
    )
    chi_square = float(((counts - 400.0) ** 2 / 400).sum())
    assert chi_square < 27.9, counts  # 99.9% of a chi-square with 9 degrees of freedom


def test_neighbours_do_not_stay_neighbours() -> None:
    images = Permutation(100_000, 1)(np.arange(100_000))
    assert np.mean(np.abs(np.diff(images)) == 1) < 1e-3
    assert abs(np.corrcoef(images, np.arange(100_000))[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("size", "key", "images"),
    [
        (10, 0, [3, 2, 5, 0, 7, 4, 1, 6]),
        (1000, 9, [18, 255, 310, 712, 250, 445, 83, 695]),
        (
            1_000_000_007,
            2**64 - 1,
            [395928318, 956045714, 529700110, 202263151, 867250420, 896096943, 490056915, 951467139],
        ),
    ],
)
def test_the_numbers_never_change(size: int, key: int, images: list[int]) -> None:
    """Recorded when the order of training was first fixed: a run that resumes depends on them."""
    assert Permutation(size, key)(np.arange(8)).tolist() == images
