"""Optimizers that know which parameter each element of a flat partition belongs to.

DeepSpeed flattens parameters, concatenates them and cuts the result at arbitrary places (ZeRO 1 to 3): an optimizer
then sees one long vector a group. That is enough for AdamW, not for one that needs the shape of a matrix, the norm of
a tensor or the number of an element. A ``PartitionedOptimizer`` is told by the engine what lies where:

    optimizer.locate(pieces, partitioned=True)     # after deepspeed.initialize; without it: whole parameters
    optimizer.step()

Its state is kept per parameter (``optimizer.state[parameter][kind]`` is a ``Moment``), for the elements of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.core.distributed import device, world_size

BLOCK = 256
"""Stretches of a parameter that is read or written begin at multiples of this many elements, so that a format with one
scale for so many elements never meets half of a block."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What this rank holds of one parameter. ``start`` and ``length`` are elements of the flattened parameter (length
    0: nothing here)."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    length: int
    master: Tensor
    """Holds the fp32 weight: the parameter itself, or the flat partition the optimizer works on."""
    offset: int
    """Where this parameter begins in ``master``."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def weight(self) -> Tensor:
        """This rank's elements, flat: the very memory."""
        return self.master.detach().view(-1).narrow(0, self.offset, self.length)

    @property
    def gradient(self) -> Tensor:
        """The gradient of these elements, flat: the very memory."""
        assert self.master.grad is not None
        return self.master.grad.view(-1).narrow(0, self.offset, self.length)

    def stretches(self, most: int) -> Iterator[tuple[int, int]]:
        """(first, end) of at most ``most`` local elements each; all but the ends are at multiples of ``most`` in the
        parameter."""
        first = 0
        while first < self.length:
            end = min(self.length, first + most - (self.start + first) % most)
            yield first, end
            first = end


class Moment(ABC):
    """State of one parameter beside its weight, in whatever format; float32 outside. ``first`` and ``end`` count
    local elements."""

    shape: tuple[int, ...] | None = None
    """None: it has an element for each of the parameter's and is cut as that is. Else its own shape, and every rank
    holds all of it."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that it takes on this rank."""

    @abstractmethod
    def read(self, first: int, end: int) -> Tensor:
        """float32, or the very memory where that is a float format."""

    @abstractmethod
    def write(self, first: int, values: Tensor, step: int | None = None) -> None:
        """Takes float32 values; ``step`` fixes the random numbers of a format that rounds stochastically, None rounds
        to nearest (exact for what ``read`` gave)."""


class Dense(Moment):
    """A tensor of one of torch's float formats."""

    def __init__(self, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.values, self.shape = values, shape

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes

    def read(self, first: int, end: int) -> Tensor:
        return self.values[first:end]

    def write(self, first: int, values: Tensor, step: int | None = None) -> None:
        self.values[first : first + values.numel()] = values


class PartitionedOptimizer(torch.optim.Optimizer, ABC):
    """Base: a subclass says what it keeps of a parameter (``moments``) and how pieces that share a master move
    (``update``)."""

    def __init__(
        self, named: Mapping[str, nn.Parameter], groups: Iterable[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        super().__init__(list(groups), defaults)
        self.locate(
            (Piece(name, p, tuple(p.shape), 0, p.numel(), p, 0) for name, p in named.items()), partitioned=False
        )

    def locate(self, pieces: Iterable[Piece], partitioned: bool) -> None:
        """Says where the parameters lie; ``partitioned``: each element is on one rank alone."""
        self.partitioned = partitioned and world_size() > 1
        self._pieces: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(id(piece.master), []).append(piece)

    @abstractmethod
    def moments(self, piece: Piece) -> dict[str, Moment]:
        """Fresh state of a parameter, zero, on the device of its master."""

    @abstractmethod
    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        """Moves the weights by their gradients. All ranks call it for the same parameters in the same order, those of
        which they hold nothing too."""

    def prepare(self, piece: Piece) -> dict[str, Any]:
        """The state of a parameter, made where there is none: its moments, and ``step``, the number of its updates."""
        state: dict[str, Any] = self.state[piece.parameter]
        if "step" not in state:
            state["step"] = 0
            state.update(self.moments(piece))
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure would run the forward pass again: not with ZeRO"
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                pieces = self._pieces[id(master)]
                for piece in pieces:
                    self.prepare(piece)["step"] += 1
                self.update(pieces, group)

    def sum_over_ranks(self, partial: Tensor) -> Tensor:
        """The sum of what each rank makes of its elements; ``partial`` itself where every rank holds all."""
        if not self.partitioned:
            return partial
        total = partial.to(device(), copy=True)  # an offloaded optimizer is on the host, the ranks talk on the device
        dist.all_reduce(total)
        return total.to(partial.device)
