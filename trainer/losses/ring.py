"""Exact sums over all pairs of a global batch while every rank holds a few slices of the others' rows.

Ranks stand in ``num_nodes`` nodes of ``node_size`` (G) lanes. Inside a node slices are shared by all; between nodes they travel lane by
lane around a ring, and what has been summed for them (a text gradient, a log-sum-exp) travels one slice behind and comes home:

    exchange        node_size            ring between nodes
    ring            1                    world nodes, one way
    bidirectional   1                    even slices go right, odd slices left: both directions of each link carry half
    gather          world                none: an all-gather and a reduce-scatter, slice by slice
    hierarchical    ranks of one host    hosts, one way

A block (one rank's rows) is cut into S equal slices (``num_slices``). Tick n computes slice n % S of the block that is n // S
hops from home, while the transfers of tick n are under way: slice n goes on to the next node and arrives there as slice n + S; sums
follow D ticks later. A receive buffer therefore holds S + 1 slices, and nothing grows with the number of ranks outside ``gather``.

Bytes sent by each rank, for b rows of p payload bytes and q bytes of sums, N nodes of G lanes (zero for a single rank):

    payload   (N - 1 + N (G - 1)) b p          sums   ((N if N > 1 else 0) + N (G - 1)) b q

which for sigmoid on the ring is (W - 1) b d e + W b d 4, e being the bytes of one embedding element on the wire. With unequal batches
the sum over ranks of b takes the place of W b. Sizes are agreed first, in one all-gather of 32 bytes a rank that is not counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.types import PeerLost, UserError

SLICE_ROWS = 1024
"""Rows of a slice at most. Larger slices make larger, faster products, and buffers that hold more."""
Exchange = Literal["ring", "bidirectional", "gather", "hierarchical"]


def num_slices(rows: int, lanes: int = 1) -> int:
    """Slices of a block of ``rows`` rows where ``lanes`` ranks share theirs; even, since ``bidirectional`` sends every other one left.

    Two are the fewest where sums follow a tick behind. Where slices are shared a rank holds those of all lanes, and sums follow two ticks
    behind: more and smaller ones.
    """
    least, most = (2, SLICE_ROWS) if lanes == 1 else (4, SLICE_ROWS // 2)
    return max(least, 2 * -(-rows // (2 * most)))


class Sums(NamedTuple):
    """What is summed for each travelling row: ``merge(mine, other)`` writes the sum of two partial results into ``mine``."""

    tail: tuple[int, ...]
    dtype: torch.dtype
    start: float
    merge: Callable[[Tensor, Tensor], Any]
    wire: torch.dtype | None = None
    """Rounded to this dtype for each transfer; summed in ``dtype`` whatever it is."""


class Slice(NamedTuple):
    """Rows ``start`` to ``start + rows`` of the block that rank ``owner`` brought."""

    owner: int
    start: int
    rows: int


@dataclass
class Mail:
    """The transfers of one tick: all are posted together, then waited for."""

    ring: Ring
    hop: int
    operations: list[dist.P2POp] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    works: list[tuple[Any, str]] = field(default_factory=list)
    arrivals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def send(self, tensor: Tensor, peer: int, what: str, wire: torch.dtype | None = None) -> None:
        if tensor.numel() and peer != self.ring.rank:
            tensor = tensor.to(wire or tensor.dtype)
            self.ring.traffic[what] += tensor.numel() * tensor.element_size()
            self._add(dist.isend, tensor, peer, f"sending {what} to")

    def receive(self, tensor: Tensor, peer: int, what: str, wire: torch.dtype | None = None) -> None:
        if tensor.numel() and peer != self.ring.rank:
            landing = torch.empty_like(tensor, dtype=wire) if wire not in (None, tensor.dtype) else tensor
            if landing is not tensor:
                self.arrivals.append((tensor, landing))
            self._add(dist.irecv, landing, peer, f"waiting for {what} of")

    def _add(self, operation: Callable[..., Any], tensor: Tensor, peer: int, label: str) -> None:
        self.operations.append(dist.P2POp(operation, tensor, group=self.ring.group, group_peer=peer))
        self.labels.append(f"{label} rank {peer}")

    def post(self) -> None:
        # NCCL needs all of a tick in one call; with gloo one call each tells which peer failed.
        apart = self.ring.backend == "gloo"
        batches = [[operation] for operation in self.operations] if apart else [self.operations]
        labels = self.labels if apart else [" and ".join(self.labels)]
        for batch, label in zip(batches, labels, strict=True):
            if batch:
                with self._naming(label):
                    self.works += [(work, label) for work in dist.batch_isend_irecv(batch)]

    def wait(self) -> None:
        for work, label in self.works:
            with self._naming(label):
                work.wait()
        for tensor, landing in self.arrivals:
            tensor.copy_(landing)

    def _naming(self, label: str) -> _Naming:
        return _Naming(f"rank {self.ring.rank} lost its peer while {label} at hop {self.hop} of {self.ring.num_nodes}")


class _Naming:
    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise PeerLost(f"{self.text}: {error}") from error


class Ring:
    """Who holds what, agreed anew for every batch.

    ``rows`` is this rank's number of rows, ``signature`` three integers (such as width and dtype) that must be equal on all ranks, else
    every rank raises UserError. ``traffic`` counts the bytes this rank has sent, by kind, until the caller empties it.
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
        self.node_size = self._lanes(exchange, node_size)
        self.num_nodes = self.world // self.node_size
        self.node, self.lane = divmod(self.rank, self.node_size)
        self.rows = self._agree(rows, signature)
        self.total_rows = sum(self.rows)
        largest = max(self.rows)
        self.num_slices = num_slices(largest, self.node_size)
        self.slice_rows = -(-largest // self.num_slices)

    def _lanes(self, exchange: Exchange, node_size: int | None) -> int:
        if exchange == "gather":
            return self.world
        if exchange != "hierarchical":
            return 1
        lanes = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        lanes = min(lanes, self.world)
        if self.world % lanes:
            raise UserError(f"node_size: {self.world} ranks do not divide into nodes of {lanes}; choose another, or exchange: ring")
        return lanes

    def _agree(self, rows: int, signature: tuple[int, int, int]) -> list[int]:
        if self.world == 1:
            return [rows]
        mine = torch.tensor([rows, *signature], dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with _Naming(f"rank {self.rank} lost a peer while the ranks agreed on their batch sizes (hop 0)"):
            dist.all_gather(everyone, mine, group=self.group)
        table: list[list[int]] = torch.stack(everyone).tolist()
        for rank, row in enumerate(table):
            if row[1:] != table[0][1:]:
                raise UserError(f"rank {rank} brought embeddings of another width, dtype or requires_grad than rank 0: make them equal")
        return [row[0] for row in table]

    def add_up(self, values: Tensor) -> Tensor:
        """``values``, summed over ranks in place: for small tables such as histograms, outside ``traffic``."""
        if self.world > 1:
            with _Naming(f"rank {self.rank} lost a peer in a sum over ranks"):
                dist.all_reduce(values, group=self.group)
        return values

    # Where things are

    def _way(self, index: int) -> int:
        return -1 if self.two_way and index % self.num_slices % 2 else 1

    def _peer(self, index: int, step: int) -> int:
        """The rank of this lane ``step`` nodes further on the way of a slice."""
        return (self.node + step * self._way(index)) % self.num_nodes * self.node_size + self.lane

    def _slice(self, index: int, lane: int) -> Slice:
        hop, number = divmod(index, self.num_slices)
        owner = (self.node - hop * self._way(index)) % self.num_nodes * self.node_size + lane
        start = min(number * self.slice_rows, self.rows[owner])
        return Slice(owner, start, min(self.slice_rows, self.rows[owner] - start))

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """(lane, rank) of the others in this node."""
        for lane in range(self.node_size):
            if lane != self.lane:
                yield lane, self.node * self.node_size + lane

    def traverse(
        self, payload: list[Tensor], sums: list[Sums], visit: Callable[[Slice, list[Tensor], list[Tensor]], None], what: str = "text"
    ) -> list[Tensor]:
        """Calls ``visit(slice, payload rows, sums)`` for every slice of every rank's ``payload``, own block first.

        ``payload`` holds tensors [rows, ...] that travel; ``visit`` adds into the sums it is given, in place. Returns, for each of
        ``sums``, the [rows, *tail] total over all ranks for this rank's own rows.
        """
        return _Traversal(self, payload, sums, what).run(visit)


class _Traversal:
    """The buffers of one trip around the ring, addressed by tick."""

    def __init__(self, ring: Ring, payload: list[Tensor], sums: list[Sums], what: str) -> None:
        self.ring, self.payload, self.sums, self.what = ring, payload, sums, what
        num_slots, rows, others = ring.num_slices + 1, ring.slice_rows, ring.node_size - 1
        travels, shared = ring.num_nodes > 1, others > 0
        self.ticks = ring.num_nodes * ring.num_slices
        # Home sums must land in slots 0, 1, ... so that they are one contiguous tensor.
        self.home = self.ticks if travels else 0
        self.delay = 2 if shared else 1
        self.num_slots = num_slots if travels else num_slots - 1

        def room(*shape: int, like: Tensor) -> Tensor:
            return like.new_empty(*shape, rows, *like.shape[1:])

        self.visitors = [room(num_slots, like=tensor) for tensor in payload] if travels else []
        self.shared = [room(2, others, like=tensor) for tensor in payload] if shared else []
        self.totals = [torch.empty(self.num_slots, rows, *s.tail, dtype=s.dtype, device=ring.device) for s in sums]
        self.partials = [torch.empty(2, others, rows, *s.tail, dtype=s.dtype, device=ring.device) for s in sums] if shared else []
        self.inbox = [torch.empty(others, rows, *s.tail, dtype=s.dtype, device=ring.device) for s in sums] if shared else []

    def run(self, visit: Callable[[Slice, list[Tensor], list[Tensor]], None]) -> list[Tensor]:
        ring = self.ring
        first = -1 if self.shared else 0
        last = self.ticks + (self.delay if self.sums and ring.world > 1 else 0)
        for tick in range(first, last):
            mail = Mail(ring, max(tick, 0) // ring.num_slices)
            if 0 <= tick < self.ticks - ring.num_slices:
                self._pass_on(mail, tick)
            if self.shared and tick + 1 < self.ticks:
                self._share(mail, tick + 1)
            if self.shared and self.sums and 1 <= tick <= self.ticks:
                self._return_partials(mail, tick - 1)
            if self.sums and ring.num_nodes > 1 and self.delay <= tick < self.ticks + self.delay:
                self._follow(mail, tick - self.delay)
            mail.post()
            if 0 <= tick < self.ticks:
                self._compute(tick, visit)
            mail.wait()
            if self.shared and self.sums and 1 <= tick <= self.ticks:
                self._merge(tick - 1)
        mine = ring.rows[ring.rank]
        return [total.view(-1, *total.shape[2:])[:mine] for total in self.totals]

    def _own_lane(self, tick: int) -> list[Tensor]:
        """The payload slice that came to this lane at ``tick``."""
        ring = self.ring
        piece = ring._slice(tick, ring.lane)
        if tick < ring.num_slices:
            return [tensor[piece.start : piece.start + piece.rows] for tensor in self.payload]
        return [visitor[tick % (ring.num_slices + 1), : piece.rows] for visitor in self.visitors]

    def _total(self, tick: int) -> list[Tensor]:
        piece = self.ring._slice(tick, self.ring.lane)
        return [total[(tick - self.home) % self.num_slots, : piece.rows] for total in self.totals]

    def _pass_on(self, mail: Mail, tick: int) -> None:
        ring = self.ring
        for mine, next_one in zip(self._own_lane(tick), self._own_lane(tick + ring.num_slices), strict=True):
            mail.send(mine, ring._peer(tick, 1), self.what)
            mail.receive(next_one, ring._peer(tick, -1), self.what)

    def _share(self, mail: Mail, tick: int) -> None:
        for number, (lane, peer) in enumerate(self.ring._neighbours()):
            rows = self.ring._slice(tick, lane).rows
            for mine, room in zip(self._own_lane(tick), self.shared, strict=True):
                mail.send(mine, peer, self.what)
                mail.receive(room[tick % 2, number, :rows], peer, self.what)

    def _return_partials(self, mail: Mail, tick: int) -> None:
        mine = self.ring._slice(tick, self.ring.lane).rows
        for number, (lane, peer) in enumerate(self.ring._neighbours()):
            rows = self.ring._slice(tick, lane).rows
            for partial, inbox, s in zip(self.partials, self.inbox, self.sums, strict=True):
                mail.send(partial[tick % 2, number, :rows], peer, "sums", s.wire)
                mail.receive(inbox[number, :mine], peer, "sums", s.wire)

    def _merge(self, tick: int) -> None:
        rows = self.ring._slice(tick, self.ring.lane).rows
        for total, inbox, s in zip(self._total(tick), self.inbox, self.sums, strict=True):
            for other in inbox:
                s.merge(total, other[:rows])

    def _follow(self, mail: Mail, tick: int) -> None:
        ring = self.ring
        for mine, next_one, s in zip(self._total(tick), self._total(tick + ring.num_slices), self.sums, strict=True):
            mail.send(mine, ring._peer(tick, 1), "sums", s.wire)
            mail.receive(next_one, ring._peer(tick, -1), "sums", s.wire)

    def _compute(self, tick: int, visit: Callable[[Slice, list[Tensor], list[Tensor]], None]) -> None:
        ring = self.ring
        totals = self._total(tick)
        if tick < ring.num_slices:
            for total, s in zip(totals, self.sums, strict=True):
                total.fill_(s.start)
        if ring._slice(tick, ring.lane).rows:
            visit(ring._slice(tick, ring.lane), self._own_lane(tick), totals)
        for number, (lane, _) in enumerate(ring._neighbours()):
            piece = ring._slice(tick, lane)
            payload = [room[tick % 2, number, : piece.rows] for room in self.shared]
            partials = [partial[tick % 2, number, : piece.rows] for partial in self.partials]
            for partial, s in zip(partials, self.sums, strict=True):
                partial.fill_(s.start)
            if piece.rows:
                visit(piece, payload, partials)
