"""The harness itself: it must report a failing rank, or every distributed test could lie."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.support.forked_ranks import run_ranks


def total(value: int) -> float:
    tensor = torch.tensor([float(value + dist.get_rank())])
    dist.all_reduce(tensor)
    return tensor.item()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one is unwell")
    dist.barrier()


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(total, 3, 10) == [33.0, 33.0, 33.0]


def test_a_raising_rank_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank one is unwell|Connection closed by peer"):
        run_ranks(fail_on_one, 2)


def test_a_dying_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 died|Connection (closed|reset) by peer"):
        run_ranks(die_on_one, 2)
