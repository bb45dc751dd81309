"""The traversal of the ring by all slices: what is sent and received at each tick, while a slice is computed (see
topology.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.core.types import is_out_of_memory
from trainer.losses.topology import Naming, Ring, Slice


class Sums(NamedTuple):
    """A sum for each travelling row: ``merge(mine, other)`` adds two partial results in place of ``mine``."""

    tail: tuple[int, ...]
    dtype: torch.dtype
    start: float
    merge: Callable[[Tensor, Tensor], Any]
    comm_dtype: torch.dtype | None = None
    """Rounded to this dtype for each transfer; summed in ``dtype`` whatever it is."""


def traverse(
    ring: Ring,
    payload: list[Tensor],
    sums: list[Sums],
    visit: Callable[[Slice, list[Tensor], list[Tensor]], None],
    what: str = "text",
) -> list[Tensor]:
    """Calls ``visit(slice, payload rows, sums)`` for every slice of every rank's ``payload``, own block first.

    ``payload`` holds tensors [rows, ...] that travel; ``visit`` adds into the sums it is given, in place. Returns, for
    each of ``sums``, the [rows, *tail] total over all ranks for this rank's own rows.

    A rank that runs out of memory continues to pass on slices, so that no other rank waits for it; at the end all ranks
    raise SharedOutOfMemory.
    """
    trip = error = None
    try:
        trip = _Traversal(ring, payload, sums, what)
    except RuntimeError as raised:
        error = _out_of_memory(raised)
    ring.check_memory(error)
    assert trip is not None
    return trip.run(visit)


def _out_of_memory(error: RuntimeError) -> RuntimeError:
    """``error`` without its frames, which reference the tensors that filled the memory; raises any other error."""
    if not is_out_of_memory(error):
        raise error
    error.__traceback__ = None
    return error


@dataclass
class Mail:
    """The transfers of one tick, which are posted together and then waited for."""

    ring: Ring
    hop: int
    operations: list[dist.P2POp] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    works: list[tuple[Any, str]] = field(default_factory=list)
    arrivals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def send(self, tensor: Tensor, peer: int, what: str, comm_dtype: torch.dtype | None = None) -> None:
        if tensor.numel() and peer != self.ring.rank:
            tensor = tensor.to(comm_dtype or tensor.dtype)
            self.ring.traffic[what] += tensor.numel() * tensor.element_size()
            self._add(dist.isend, tensor, peer, f"sending {what} to")

    def receive(self, tensor: Tensor, peer: int, what: str, comm_dtype: torch.dtype | None = None) -> None:
        if tensor.numel() and peer != self.ring.rank:
            landing = torch.empty_like(tensor, dtype=comm_dtype) if comm_dtype not in (None, tensor.dtype) else tensor
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

    def _naming(self, label: str) -> Naming:
        return Naming(f"rank {self.ring.rank} lost its peer while {label} at hop {self.hop} of {self.ring.num_nodes}")


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
        self.partials = (
            [torch.empty(2, others, rows, *s.tail, dtype=s.dtype, device=ring.device) for s in sums] if shared else []
        )
        self.inbox = (
            [torch.empty(others, rows, *s.tail, dtype=s.dtype, device=ring.device) for s in sums] if shared else []
        )

    def run(self, visit: Callable[[Slice, list[Tensor], list[Tensor]], None]) -> list[Tensor]:
        ring, error = self.ring, None
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
            if 0 <= tick < self.ticks and error is None:
                try:
                    self._compute(tick, visit)
                except RuntimeError as raised:
                    error = _out_of_memory(raised)
            mail.wait()
            if self.shared and self.sums and 1 <= tick <= self.ticks:
                self._merge(tick - 1)
        ring.check_memory(error)
        mine = ring.rows[ring.rank]
        return [total.view(-1, *total.shape[2:])[:mine] for total in self.totals]

    def _own_lane(self, tick: int) -> list[Tensor]:
        """The payload slice that came to this lane at ``tick``."""
        ring = self.ring
        piece = ring.slice_at(tick, ring.lane)
        if tick < ring.num_slices:
            return [tensor[piece.start : piece.start + piece.rows] for tensor in self.payload]
        return [visitor[tick % (ring.num_slices + 1), : piece.rows] for visitor in self.visitors]

    def _total(self, tick: int) -> list[Tensor]:
        piece = self.ring.slice_at(tick, self.ring.lane)
        return [total[(tick - self.home) % self.num_slots, : piece.rows] for total in self.totals]

    def _pass_on(self, mail: Mail, tick: int) -> None:
        ring = self.ring
        for mine, next_one in zip(self._own_lane(tick), self._own_lane(tick + ring.num_slices), strict=True):
            mail.send(mine, ring.peer(tick, 1), self.what)
            mail.receive(next_one, ring.peer(tick, -1), self.what)

    def _share(self, mail: Mail, tick: int) -> None:
        for number, (lane, peer) in enumerate(self.ring.neighbours()):
            rows = self.ring.slice_at(tick, lane).rows
            for mine, room in zip(self._own_lane(tick), self.shared, strict=True):
                mail.send(mine, peer, self.what)
                mail.receive(room[tick % 2, number, :rows], peer, self.what)

    def _return_partials(self, mail: Mail, tick: int) -> None:
        mine = self.ring.slice_at(tick, self.ring.lane).rows
        for number, (lane, peer) in enumerate(self.ring.neighbours()):
            rows = self.ring.slice_at(tick, lane).rows
            for partial, inbox, s in zip(self.partials, self.inbox, self.sums, strict=True):
                mail.send(partial[tick % 2, number, :rows], peer, "sums", s.comm_dtype)
                mail.receive(inbox[number, :mine], peer, "sums", s.comm_dtype)

    def _merge(self, tick: int) -> None:
        rows = self.ring.slice_at(tick, self.ring.lane).rows
        for total, inbox, s in zip(self._total(tick), self.inbox, self.sums, strict=True):
            for other in inbox:
                s.merge(total, other[:rows])

    def _follow(self, mail: Mail, tick: int) -> None:
        ring = self.ring
        for mine, next_one, s in zip(self._total(tick), self._total(tick + ring.num_slices), self.sums, strict=True):
            mail.send(mine, ring.peer(tick, 1), "sums", s.comm_dtype)
            mail.receive(next_one, ring.peer(tick, -1), "sums", s.comm_dtype)

    def _compute(self, tick: int, visit: Callable[[Slice, list[Tensor], list[Tensor]], None]) -> None:
        ring = self.ring
        totals = self._total(tick)
        if tick < ring.num_slices:
            for total, s in zip(totals, self.sums, strict=True):
                total.fill_(s.start)
        if ring.slice_at(tick, ring.lane).rows:
            visit(ring.slice_at(tick, ring.lane), self._own_lane(tick), totals)
        for number, (lane, _) in enumerate(ring.neighbours()):
            piece = ring.slice_at(tick, lane)
            payload = [room[tick % 2, number, : piece.rows] for room in self.shared]
            partials = [partial[tick % 2, number, : piece.rows] for partial in self.partials]
            for partial, s in zip(partials, self.sums, strict=True):
                partial.fill_(s.start)
            if piece.rows:
                visit(piece, payload, partials)
