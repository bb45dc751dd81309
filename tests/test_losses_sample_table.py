"""What a loss remembers of each sample: divided over ranks, taken back, stored in chunks that any number of ranks loads."""

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.forked_ranks import run_ranks
from trainer.losses.sample_table import CHUNK, SampleTable

IDS = torch.tensor([5, 3 * CHUNK, 3 * CHUNK + 1, CHUNK, 7, 5])
VALUES = torch.arange(12.0).view(6, 2) + 1


def write_and_store(_: str) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    table = SampleTable(2)
    table.write(IDS, VALUES)
    return table.read(IDS), dict(table.pieces()), table.names


def load(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    table = SampleTable(2)
    first = not dist.is_initialized() or dist.get_rank() == 0
    table.load(stored, lambda name: stored[name] if first else pytest.fail("only rank 0 reads"))
    return table.read(IDS), table.read(torch.tensor([4, 2 * CHUNK, 10**12]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_stores_and_loads_the_same(ranks: int) -> None:
    wanted = VALUES.clone()
    wanted[0] = VALUES[5]  # sample 5 comes twice: the last counts
    found = run_ranks(write_and_store, ranks, "")
    for values, _, names in found:
        assert torch.equal(values, wanted)
        assert names == ["samples.0", "samples.1", "samples.3"]
    stored = found[0][1]
    assert list(stored) == found[0][2] and all(not part for _, part, _ in found[1:])
    for others in (1, 2, 3):
        for values, never in run_ranks(load, others, stored):
            assert torch.equal(values, wanted) and not never.any()


def test_writes_can_be_taken_back() -> None:
    table = SampleTable(2)
    table.write(IDS, VALUES)
    before = table.read(IDS)
    restore = table.snapshot()
    for _ in range(2):
        table.write(IDS, VALUES + 50)
        table.write(torch.tensor([9 * CHUNK, 5]), VALUES[:2] - 9)
        restore()
        assert torch.equal(table.read(IDS), before) and not table.read(torch.tensor([9 * CHUNK])).any()
        assert table.names == ["samples.0", "samples.1", "samples.3"]


def a_billion(_: str) -> int:
    """Resident bytes that a table takes after a step of 4,096 samples out of a billion."""
    process = psutil.Process()
    table = SampleTable(2)
    table.read(IDS)  # the process group's own buffers
    before = process.memory_info().rss
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 10**9, 4096))
    table.write(ids, torch.ones(4096, 2))
    assert table.read(ids).eq(1).all()
    return process.memory_info().rss - before


def test_a_billion_samples_take_memory_only_as_they_are_seen() -> None:
    """4,096 samples touch a page of 4 KiB each, 16 MiB over all ranks; allocated at once it would be 4 GB a rank."""
    assert max(run_ranks(a_billion, 2, "")) < 100 << 20
