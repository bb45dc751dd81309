"""What NCCL demands of an exchange, simulated: it pairs the sends and receives of two ranks strictly in the order in
which they were posted, and a rank goes on only when all that it posted together has been paired."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.support.forked_ranks import run_ranks
from trainer.core.types import UserError
from trainer.losses import SigmoidLoss
from trainer.losses.exchange import Sums, traverse
from trainer.losses.topology import Exchange, Ring


class Posted(NamedTuple):
    """One operation of one rank."""

    sends: bool
    peer: int
    dtype: torch.dtype
    numel: int


class Finished:
    def wait(self) -> None: ...


@contextmanager
def on_nccl(rank: int, rows: list[int], node_sizes: list[int]) -> Iterator[list[list[Posted]]]:
    """Within, a traversal believes that it is this rank of a group on nccl; gives what it posts, batch by batch."""
    log: list[list[Posted]] = []

    def operation(op: Any, tensor: torch.Tensor, group: Any = None, group_peer: int = -1) -> Posted:
        assert tensor.is_contiguous() and tensor.numel()
        return Posted(op is dist.isend, group_peer, tensor.dtype, tensor.numel())

    def post(operations: list[Posted]) -> list[Finished]:
        log.append(operations)
        return [Finished()]

    with ExitStack() as stack:
        for target, name, value in (
            (dist, "is_initialized", lambda: True),
            (dist, "get_rank", lambda group=None: rank),
            (dist, "get_world_size", lambda group=None: len(rows)),
            (dist, "get_backend", lambda group=None: "nccl"),
            (dist, "P2POp", operation),
            (dist, "batch_isend_irecv", post),
            (Ring, "_agree", lambda *_: (rows, node_sizes)),
            (Ring, "check_memory", lambda *_: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield log


class Case(NamedTuple):
    """One traversal."""

    rows: list[int]
    exchange: Exchange
    node_size: int
    num_sums: int
    num_payloads: int
    comm_dtype: torch.dtype | None


def posted(case: Case, rank: int) -> list[list[Posted]]:
    node_sizes = [{"gather": len(case.rows), "hierarchical": case.node_size}.get(case.exchange, 1)] * len(case.rows)
    with on_nccl(rank, case.rows, node_sizes) as log:
        mine = case.rows[rank]
        ring = Ring(mine, (1, 1, 1), case.exchange, case.node_size, device="meta")
        payload = [
            torch.empty(mine, 4, device="meta"),
            torch.empty(mine, dtype=torch.int64, device="meta"),
            torch.empty(mine, 2, dtype=torch.float64, device="meta"),
        ]
        sums = [
            Sums((4,), torch.float32, 0.0, torch.Tensor.add_, case.comm_dtype),
            Sums((), torch.float64, 0.0, torch.Tensor.add_),
        ]
        traverse(ring, payload[: case.num_payloads], sums[: case.num_sums], lambda *_: None)
        return log


def outcome(ranks: list[list[list[Posted]]]) -> str:
    """``done``, or where the ranks wait for each other for ever, or meet with unlike messages."""
    left = [[list(batch) for batch in batches] for batches in ranks]
    while any(left):
        moved = False
        for sender, batches in enumerate(left):
            if not batches:
                continue
            for send in [one for one in batches[0] if one.sends]:
                others = left[send.peer]
                earlier = next(one for one in batches[0] if one.sends and one.peer == send.peer)
                waiting = [one for one in others[0] if not one.sends and one.peer == sender] if others else []
                if earlier is not send or not waiting:
                    continue
                if waiting[0][2:] != send[2:]:
                    return f"rank {sender} sends {send}, rank {send.peer} expects {waiting[0]}"
                batches[0].remove(send)
                others[0].remove(waiting[0])
                moved = True
        for batches in left:
            while batches and not batches[0]:
                batches.pop(0)
                moved = True
        if not moved:
            return f"deadlock, next are {[batches[0] if batches else 'done' for batches in left]}"
    return "done"


def cases(number: int) -> list[Case]:
    dice = random.Random(0)
    found = []
    for _ in range(number):
        world = dice.choice([2, 2, 3, 4, 5, 6, 8])
        equal = dice.random() < 0.3
        rows = [dice.choice([1, 16, 1100])] * world if equal else dice.choices([1, 2, 3, 5, 16, 700, 1500], k=world)
        found.append(
            Case(
                rows,
                dice.choice(["ring", "bidirectional", "gather", "hierarchical"]),
                dice.choice([size for size in range(1, world + 1) if world % size == 0]),
                dice.choice([0, 1, 2]),
                dice.choice([1, 2, 3]),
                dice.choice([None, torch.bfloat16]),
            )
        )
    return found


@pytest.mark.parametrize("case", cases(40))
def test_no_exchange_can_deadlock_under_the_order_that_nccl_keeps(case: Case) -> None:
    assert outcome([posted(case, rank) for rank in range(len(case.rows))]) == "done"


@pytest.mark.slow
def test_no_exchange_can_deadlock_in_many_cases() -> None:
    for case in cases(400):
        assert outcome([posted(case, rank) for rank in range(len(case.rows))]) == "done", case


def test_the_simulation_sees_a_deadlock_and_unlike_messages() -> None:
    there, back = Posted(True, 1, torch.float32, 8), Posted(False, 1, torch.float32, 8)
    mine, yours = Posted(True, 0, torch.float32, 8), Posted(False, 0, torch.float32, 8)
    assert outcome([[[there, back]], [[mine, yours]]]) == "done"
    assert outcome([[[there], [back]], [[mine], [yours]]]).startswith("deadlock")
    assert outcome([[[there]], [[yours._replace(numel=9)]]]).startswith("rank 0 sends")


def unequal_nodes(ranks_here: list[int]) -> str:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_here[dist.get_rank()])
    loss = SigmoidLoss(exchange="hierarchical")
    with pytest.raises(UserError) as raised:
        loss.connect(torch.device("cpu"))
    return str(raised.value)


def test_nodes_of_unequal_size_are_refused_on_every_rank_with_what_would_do() -> None:
    for message in run_ranks(unequal_nodes, 6, [4, 4, 4, 4, 2, 2], timeout=30):
        assert message == (
            "loss.exchange: hierarchical needs as many ranks on every node, but there are 4 on that of rank 0 and 2 on "
            "that of rank 4: set loss.node_size=2, or loss.exchange=ring"
        )


@pytest.mark.parametrize(
    ("exchange", "node_size"), [("ring", 1), ("bidirectional", 1), ("gather", 4), ("hierarchical", 2)]
)
def test_connecting_opens_every_connection_that_a_step_uses(exchange: Exchange, node_size: int) -> None:
    """NCCL takes memory for a connection when two ranks first talk: it must be there before the model fills the
    card."""

    def peers(log: list[list[Posted]]) -> set[tuple[bool, int]]:
        return {(one.sends, one.peer) for batch in log for one in batch}

    world = 4
    for rank in range(world):
        sizes = [{"gather": world, "hierarchical": node_size}.get(exchange, 1)] * world
        with on_nccl(rank, [8] * world, sizes) as log:
            SigmoidLoss(exchange=exchange, node_size=node_size).connect(torch.device("meta"))
        assert peers(log) == peers(posted(Case([1100] * world, exchange, node_size, 1, 1, None), rank)) != set()
