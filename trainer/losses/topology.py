"""Exact sums over all pairs of a global batch, while every rank holds only a few slices of the others' rows.

Ranks form ``num_nodes`` nodes of ``node_size`` (G) lanes. Inside a node all ranks share slices; between nodes slices
travel lane by lane around a ring, and their sums (a text gradient, a log-sum-exp) follow one slice behind and return to
their owner:

    exchange        node_size            ring between nodes
    ring            1                    world nodes, one way
    bidirectional   1                    even slices go right, odd slices left: both directions of each link carry half
    gather          world                none: an all-gather and a reduce-scatter, slice by slice
    hierarchical    ranks of one host    hosts, one way

A block (one rank's rows) is cut into S equal slices (``num_slices``), what one message holds. The schedule advances in
ticks: tick n computes slice n % S of the block that is
n // S hops from home, while the transfers of tick n are under way (traversal.py): slice n goes on to the next node and
arrives there as slice n + S; sums follow D ticks later. A receive buffer therefore holds S + 1 slices, and nothing
grows with the number of ranks outside ``gather``.

Bytes sent by each rank, for b rows of p payload bytes and q bytes of sums, N nodes of G lanes (zero for a single rank):

    payload   (N - 1 + N (G - 1)) b p          sums   ((N if N > 1 else 0) + N (G - 1)) b q

which for sigmoid on the ring is (W - 1) b d e + W b d 4, e being the bytes of one embedding element on the wire. With
unequal batches the sum over ranks of b takes the place of W b. Sizes are agreed first, in one all-gather of 40 bytes a
rank that is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import gcd
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.core.distributed import ranks_here
from trainer.core.types import PeerLost, SharedOutOfMemory, UserError, is_out_of_memory

SLICE_ROWS, GPU_SLICE_ROWS = 512, 8192
"""Largest slice in rows. Larger ones need more memory without faster products; smaller ones make products slower. A
GPU's products of 8,192 rows run at 650 TFLOP/s, of 512 at 30 (H100, float16)."""
Exchange = Literal["ring", "bidirectional", "gather", "hierarchical"]


def num_slices(rows: int, lanes: int = 1, device: str = "cpu") -> int:
    """Slices of a block of ``rows`` rows where ``lanes`` ranks share theirs, on a ``device`` of this type; even, since
    ``bidirectional`` sends every other one left.

    Two are the fewest where sums follow a tick behind. Where slices are shared a rank holds those of all lanes, and
    sums follow two ticks behind: more and smaller ones.
    """
    limit = SLICE_ROWS if device == "cpu" else GPU_SLICE_ROWS
    return max(2 if lanes == 1 else 4, 2 * -(-rows // (2 * limit)))


class Slice(NamedTuple):
    """Rows ``start`` to ``start + rows`` of the block that rank ``owner`` brought."""

    owner: int
    start: int
    rows: int


class Naming:
    """Turns the error of a transfer into PeerLost with this message, unless this rank itself ran out of memory."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise PeerLost(f"{self.text}: {error}") from error


class Ring:
    """Which rank holds what, agreed for every batch.

    ``rows`` is this rank's number of rows, ``signature`` three integers (such as width and dtype) that must be equal on
    all ranks, else every rank raises UserError. ``traffic`` counts the bytes this rank has sent, by kind, until the
    caller empties it.
    """

    def __init__(
        self,
        rows: int,
        signature: tuple[int, int, int],
        exchange: Exchange = "ring",
        node_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        traffic: Counter[str] | None = None,
    ) -> None:
        self.group = group
        self.up = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.up else 0
        self.world = dist.get_world_size(group) if self.up else 1
        self.backend = dist.get_backend(group) if self.up else ""
        self.device = torch.device(device)
        self.traffic = traffic if traffic is not None else Counter()
        self.two_way = exchange == "bidirectional"
        self.rows, node_sizes = self._agree(rows, self._lanes(exchange, node_size), signature)
        self.node_size = self._common(node_sizes)
        self.num_nodes = self.world // self.node_size
        self.node, self.lane = divmod(self.rank, self.node_size)
        self.total_rows = sum(self.rows)
        largest = max(self.rows)
        self.num_slices = num_slices(largest, self.node_size, self.device.type)
        self.slice_rows = -(-largest // self.num_slices)

    def _lanes(self, exchange: Exchange, node_size: int | None) -> int:
        """Number of ranks that share slices on this rank's node; 0 if unknown."""
        if exchange == "gather":
            return self.world
        if exchange != "hierarchical" or self.world == 1:
            return 1
        return min(node_size or ranks_here() or 0, self.world)

    def _common(self, node_sizes: list[int]) -> int:
        """The number of lanes, equal on all nodes; otherwise raises UserError on every rank."""
        lanes = node_sizes[0]
        if 0 in node_sizes:
            raise UserError(
                "loss.exchange: hierarchical, but no launcher says how many ranks a node has: set loss.node_size"
            )
        if len(set(node_sizes)) > 1:
            other = next(rank for rank, size in enumerate(node_sizes) if size != lanes)
            raise UserError(
                f"loss.exchange: hierarchical needs as many ranks on every node, but there are {lanes} on that of rank "
                "0 "
                f"and {node_sizes[other]} on that of rank {other}: set loss.node_size={gcd(*node_sizes)}, or "
                f"loss.exchange=ring"
            )
        if self.world % lanes:
            raise UserError(
                f"node_size: {self.world} ranks do not divide into nodes of {lanes}; choose another, or exchange: ring"
            )
        return lanes

    def _agree(self, rows: int, lanes: int, signature: tuple[int, int, int]) -> tuple[list[int], list[int]]:
        """The rows and lanes of all ranks."""
        if self.world == 1:
            return [rows], [lanes]
        mine = torch.tensor([rows, lanes, *signature], dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with Naming(f"rank {self.rank} lost a peer while the ranks agreed on their batch sizes (hop 0)"):
            dist.all_gather(everyone, mine, group=self.group)
        table: list[list[int]] = torch.stack(everyone).tolist()
        for rank, row in enumerate(table):
            if row[2:] != table[0][2:]:
                raise UserError(
                    f"rank {rank} brought embeddings of another width, dtype or requires_grad than rank 0: make them "
                    f"equal"
                )
        return [row[0] for row in table], [row[1] for row in table]

    def add_up(self, values: Tensor) -> Tensor:
        """``values``, summed over ranks in place: for small tables such as histograms, outside ``traffic``."""
        if self.world > 1:
            with Naming(f"rank {self.rank} lost a peer in a sum over ranks"):
                dist.all_reduce(values, group=self.group)
        return values

    def check_memory(self, error: BaseException | None) -> None:
        """Raises SharedOutOfMemory on all ranks if any of them has an ``error``. A collective."""
        failed = error is not None
        if self.world > 1:
            vote = torch.tensor([int(failed)], device=self.device)
            with Naming(f"rank {self.rank} lost a peer while the ranks asked each other whether their memory sufficed"):
                dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.group)
            failed = bool(vote.item())
        if failed:
            raise SharedOutOfMemory(str(error or "another rank ran out of memory"))

    # Where things are

    def _way(self, index: int) -> int:
        return -1 if self.two_way and index % self.num_slices % 2 else 1

    def peer(self, index: int, step: int) -> int:
        """The rank of this lane ``step`` nodes further along a slice's path."""
        return (self.node + step * self._way(index)) % self.num_nodes * self.node_size + self.lane

    def slice_at(self, index: int, lane: int) -> Slice:
        hop, number = divmod(index, self.num_slices)
        owner = (self.node - hop * self._way(index)) % self.num_nodes * self.node_size + lane
        start = min(number * self.slice_rows, self.rows[owner])
        return Slice(owner, start, min(self.slice_rows, self.rows[owner] - start))

    def neighbours(self) -> Iterator[tuple[int, int]]:
        """(lane, rank) of the others in this node."""
        for lane in range(self.node_size):
            if lane != self.lane:
                yield lane, self.node * self.node_size + lane
