"""Memory of one step is what the formula says, and the same on any number of ranks."""

import pytest
import torch

from tests.benchmarks.loss import Case, LiveTensors, peak_extra, tracked_peak
from tests.support.forked_ranks import run_ranks

with LiveTensors():  # its first use imports for two seconds: once here, not in every forked rank
    torch.ones(1)

ROWS, WIDTH = 512, 512
BLOCK = ROWS * WIDTH * 4 / 2**20


TILES = 2 * ROWS * (ROWS / 2) * 4 / 2**20
"""One of logits and one of scratch; on the ring a slice is half a block of this size."""


def peaks(world, variant, rows=ROWS):
    return run_ranks(tracked_peak, world, Case(world, rows, WIDTH, torch.float32), variant)


@pytest.mark.parametrize("variant", ["ring", "bidirectional"])
def test_peak_is_the_formulas_and_flat_in_ranks(variant):
    two, eight = max(peaks(2, variant)), max(peaks(8, variant))
    formula = (
        BLOCK * (1 + 2 * (1 + 1 / 2)) + TILES
    )  # one image gradient; texts and text gradient with a slice more each
    assert two == pytest.approx(formula, rel=0.02)
    assert eight <= two * 1.03


def test_small_tiles_come_close_to_the_floor():
    """Embeddings that arrive, and both gradients: no exact loss over the ring can hold less."""
    assert max(peaks(2, "ring, 256-row tiles", 4096)) <= 1.3 * 3 * BLOCK * 4096 / ROWS


def test_gather_grows_by_slices_only():
    """W - 1 slices (a quarter of a block) of texts twice, partial sums twice, and an inbox."""
    for world in (2, 4):
        others = 5 * (world - 1) / 4
        formula = BLOCK * (2 + others) + TILES / 2
        assert max(peaks(world, "gather")) <= formula * 1.05


def test_evaluation_needs_no_gradients():
    measured = run_ranks(tracked_peak, 2, Case(2, ROWS, WIDTH, torch.float32), "ring", False)
    assert max(measured) <= BLOCK * (1 + 1 / 2) + TILES + 0.05


@pytest.mark.slow
def test_resident_memory_at_4096_pairs_a_rank():
    assert max(run_ranks(peak_extra, 2, Case(2, 4096, 768, torch.float32), "ring", timeout=300)) <= 110
