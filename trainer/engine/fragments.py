"""What this rank holds of every parameter of a DeepSpeed engine, at ZeRO 0, 1, 2 and 3, and whole tensors in buckets.

for fragment in fragments(ds_engine):
    fragment.read("weight")                                # this rank's elements of it, flat
for bucket in buckets(pieces, kinds, BUCKET_BYTES):
    span.gather(part)                                      # puts there what this rank has of a stretch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from trainer.core.distributed import is_main, rank
from trainer.core.partitioned import BLOCK, Moment, PartitionedOptimizer, Piece
from trainer.core.types import UserError
from trainer.engine.state_names import WEIGHT

BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Fragment(Piece):
    """What this rank holds of one parameter, and of what the optimizer keeps of it."""

    owned: bool
    """Exactly one rank owns each element: it is the one to be asked for it."""
    optimizer: torch.optim.Optimizer | None
    """Whose state holds the moments; None for a frozen parameter."""

    @property
    def key(self) -> Tensor:
        """What the optimizer's state is under."""
        return self.parameter if isinstance(self.optimizer, PartitionedOptimizer) else self.master

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's; a copy where there is none yet."""
        return self.optimizer.state.get(self.key, {}) if self.optimizer is not None else {}

    def kinds(self) -> dict[str, tuple[int, ...]]:
        """What there is to save and its whole shape: before the optimizer's first step (and for frozen parameters) the
        weight alone."""
        found = {WEIGHT: self.shape}
        for kind, value in sorted(self.state.items()):
            if isinstance(value, Moment):
                found[kind] = value.shape or self.shape
            elif torch.is_tensor(value) and value.shape == self.master.shape and kind != "step":
                found[kind] = self.shape
        return found

    def extent(self, kind: str) -> tuple[int, int, bool]:
        """(first element, number of elements) that this rank holds of the whole tensor, and whether it is to be asked
        for them."""
        shape = getattr(self.state.get(kind), "shape", None)
        if isinstance(self.state.get(kind), Moment) and shape is not None:
            return 0, prod(shape), is_main()
        return self.start, self.length, self.owned

    def read(self, kind: str, first: int = 0, end: int | None = None) -> Tensor:
        """Elements [first, end) of those that this rank holds, flat: the very memory, but for moments in 8 bits."""
        end = self.extent(kind)[1] if end is None else end
        value = self.weight if kind == WEIGHT or self.optimizer is None else self.state[kind]
        if isinstance(value, Moment):
            return value.read(first, end)
        flat = value if kind == WEIGHT else value.detach().view(-1).narrow(0, self.offset, self.length)
        return flat[first:end]

    def write(self, kind: str, first: int, values: Tensor) -> None:
        """Puts float32 values there."""
        value = self.state.get(kind) if kind != WEIGHT else None
        if isinstance(value, Moment):
            value.write(first, values)
        else:
            self.read(kind)[first : first + values.numel()].copy_(values)


class Span(NamedTuple):
    """A stretch of one parameter's tensor of some kind: all of it, unless it is larger than a bucket."""

    piece: Fragment
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.numel == prod(self.shape)

    @property
    def last(self) -> bool:
        return self.stop == prod(self.shape)

    def overlap(self) -> tuple[int, int, int]:
        """Where the span and what this rank holds overlap: first local element, first of the span, how many."""
        held, length, _ = self.piece.extent(self.kind)
        start = max(self.start, held)
        many = min(self.stop, held + length) - start
        return (start - held, start - self.start, many) if many > 0 else (0, 0, 0)

    def gather(self, part: Tensor) -> None:
        """Puts into ``part``, the span's values, those that this rank has to give."""
        local, there, many = self.overlap()
        if many and self.piece.extent(self.kind)[2]:
            part[there : there + many] = self.piece.read(self.kind, local, local + many)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragment of every parameter of a DeepSpeed engine, in the order of ``named_parameters`` (the same on
    all ranks).

    Frozen weights that are packed into bytes (8 and 4 bits) are left out: they are read from the base model again.
    """
    optimizer = engine.optimizer
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.is_floating_point()]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return [_sharded(optimizer, name, parameter) for name, parameter in named]
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups = {
            id(parameter): number for number, members in enumerate(optimizer.bit16_groups) for parameter in members
        }
        return [_flattened(optimizer, name, parameter, groups) for name, parameter in named]
    if isinstance(optimizer, torch.optim.Optimizer):
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [
            _replicated(name, parameter, optimizer if id(parameter) in trained else None) for name, parameter in named
        ]
    raise UserError(
        f"no way to save the state of DeepSpeed's {type(optimizer).__name__}: use one of the files in ds_configs/"
    )


def _replicated(name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> Fragment:
    """ZeRO 0, and frozen parameters at ZeRO 1 and 2: every rank holds the whole, rank 0 is asked."""
    return Fragment(name, parameter, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, is_main(), optimizer)


def _flattened(zero: Any, name: str, parameter: nn.Parameter, groups: dict[int, int]) -> Fragment:
    """ZeRO 1 and 2: the optimizer works on one flat fp32 partition per group; the model's own copy is whole on every
    rank."""
    if not hasattr(parameter, "_hp_mapping"):
        return _replicated(name, parameter, None)
    shape, mapping = tuple(parameter.shape), parameter._hp_mapping
    if mapping is None:  # this parameter lies in the partitions of other ranks; its group tells which moments there are
        master = zero.single_partition_of_fp32_groups[groups[id(parameter)]]
        return Fragment(name, parameter, shape, 0, 0, master, 0, True, zero.optimizer)
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, parameter, shape, here.start, here.numel, master, there.start, True, zero.optimizer)


def _sharded(zero: Any, name: str, parameter: Any) -> Fragment:
    """ZeRO 3: each parameter is cut into one piece a rank, the last one padded; trained pieces lie side by side in flat
    groups."""
    shape, piece = tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
    start = min(rank() * piece, parameter.ds_numel)
    length = min(piece, parameter.ds_numel - start)
    position = zero.grad_position.get(zero.get_param_id(parameter))
    if position is None:
        return Fragment(name, parameter, shape, start, length, parameter.ds_tensor, 0, True, None)
    group, offset, _ = position
    optimizer = zero.optimizer
    if (
        zero.offload_optimizer and zero.subgroup_to_device[group] != "cpu"
    ):  # a ratio below 1 leaves some groups on the GPU
        optimizer = zero.backup_optimizer
    master = zero.fp32_partitioned_groups_flat[group]
    return Fragment(name, parameter, shape, start, length, master, offset, True, optimizer)


def buckets(
    pieces: list[Fragment], kinds: dict[str, dict[str, tuple[int, ...]]], bucket_bytes: int
) -> Iterator[list[Span]]:
    """All tensors in order, as many as fit at a time; one that does not fit is cut, its stretches follow each other."""
    largest = max(1, bucket_bytes // 4)
    largest -= largest % BLOCK if largest > BLOCK else 0
    bucket: list[Span] = []
    size = 0
    for piece in pieces:
        for kind, shape in kinds[piece.name].items():
            numel = prod(shape)
            for start in range(0, numel, largest):
                span = Span(piece, kind, shape, start, min(start + largest, numel))
                if bucket and size + span.numel > largest:
                    yield bucket
                    bucket, size = [], 0
                bucket.append(span)
                size += span.numel
    if bucket:
        yield bucket


def write_model_copy(span: Span, values: Tensor) -> None:
    """The copy that forward reads, where it is not the master itself."""
    parameter: Any = span.piece.parameter
    whole = parameter.data
    if hasattr(parameter, "ds_tensor"):
        if parameter.ds_tensor.status.name != "AVAILABLE":
            raise UserError(
                "parameters offloaded to NVMe cannot be restored: resume with a ds_config that offloads them to the CPU"
            )
        local, there, many = span.overlap()
        parameter.ds_tensor.data.view(-1)[local : local + many] = values[there : there + many]
        if parameter.ds_status.name != "AVAILABLE":  # only small ("persistent") parameters are kept whole too
            return
    whole.view(-1)[span.start : span.stop].copy_(values)
