"""After every fault the run ends by itself and goes on with the same curve and the same samples, on another number of
ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import Chaos, small_disk


@pytest.mark.parametrize(
    ("faults", "seed"), [(5, 0), pytest.param(100, 0, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_nothing_is_lost_whatever_happens(tmp_path: Path, faults: int, seed: int) -> None:
    with small_disk(tmp_path / "disk") as disk:
        Chaos(tmp_path, faults, seed, disk).go(print)


def test_a_disk_can_be_filled_here(tmp_path: Path) -> None:
    """Says so where it cannot: the chaos above then leaves that fault out."""
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("mount -t tmpfs is not permitted: run the tests as root to fill a disk")
