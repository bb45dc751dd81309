"""The training state as whole tensors by parameter name, however DeepSpeed has cut it up: read and restored at ZeRO 0,
1, 2 and 3.

    for name, kind, tensor in read_state(ds_engine): ...      # rank 0 sees every tensor, one bucket of memory at a time
    restore_state(ds_engine, layout, steps, read)             # rank 0 reads, every rank keeps its part

``kind`` is ``"weight"``, a moment of the optimizer (``"exp_avg"``, ``"exp_avg_sq"``) or the running average of the
weights (``"ema"``), which lies among the moments and so is cut up, saved and restored as they are. Everything is fp32
(a frozen weight that is held in bf16 becomes it) and travels as bits: what is restored equals what was read exactly, in
any other layout (ranks, ZeRO stage, offload) too.

Rank 0 alone reads and writes files: one file that plain tools open, no shared file system needed, and one place where a
full disk shows. DeepSpeed's own ``safe_get_full_*`` answers None at ZeRO 0 and for frozen parameters and gathers on
every rank, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from trainer.core.collectives import barrier
from trainer.core.distributed import device, is_main, rank, world_size
from trainer.core.types import UserError
from trainer.engine.state_names import AVERAGE, WEIGHT

BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Fragment:
    """What this rank holds of one parameter. ``start`` and ``length`` are elements of the flattened parameter (length
    0: nothing here)."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    length: int
    owned: bool
    """Exactly one rank owns each element: it is the one to be asked for it."""
    master: Tensor
    """Holds the fp32 weight: the parameter itself, or the flat partition the optimizer works on."""
    offset: int
    """Where this parameter begins in ``master``."""
    optimizer: torch.optim.Optimizer | None
    """Whose state, under ``master``, holds the moments; None for a frozen parameter."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self, kind: str) -> Tensor:
        """This rank's elements, flat: the very memory, not a copy."""
        holder = self.master if kind == WEIGHT or self.optimizer is None else self.optimizer.state[self.master][kind]
        return holder.detach().view(-1).narrow(0, self.offset, self.length)

    def kinds(self) -> list[str]:
        """What there is to save: before the optimizer's first step (and for frozen parameters) the weight alone."""
        if self.optimizer is None:
            return [WEIGHT]
        state = self.optimizer.state.get(self.master, {})
        return [
            WEIGHT,
            *sorted(k for k, v in state.items() if torch.is_tensor(v) and v.shape == self.master.shape and k != "step"),
        ]


class Span(NamedTuple):
    """A stretch of one parameter's tensor of some kind: all of it, unless it is larger than a bucket."""

    piece: Fragment
    kind: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.numel == self.piece.numel

    def here(self, local: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """Where the span and what this rank holds (``local``) overlap: that part of each."""
        start = max(self.start, self.piece.start)
        length = max(0, min(self.stop, self.piece.start + self.piece.length) - start)
        if not length:
            return local[:0], span[:0]
        return local.narrow(0, start - self.piece.start, length), span.narrow(0, start - self.start, length)


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
    return Fragment(name, parameter, tuple(parameter.shape), 0, parameter.numel(), is_main(), parameter, 0, optimizer)


def _flattened(zero: Any, name: str, parameter: nn.Parameter, groups: dict[int, int]) -> Fragment:
    """ZeRO 1 and 2: the optimizer works on one flat fp32 partition per group; the model's own copy is whole on every
    rank."""
    if not hasattr(parameter, "_hp_mapping"):
        return _replicated(name, parameter, None)
    shape, mapping = tuple(parameter.shape), parameter._hp_mapping
    if mapping is None:  # this parameter lies in the partitions of other ranks; its group tells which moments there are
        master = zero.single_partition_of_fp32_groups[groups[id(parameter)]]
        return Fragment(name, parameter, shape, 0, 0, True, master, 0, zero.optimizer)
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, parameter, shape, here.start, here.numel, True, master, there.start, zero.optimizer)


def _sharded(zero: Any, name: str, parameter: Any) -> Fragment:
    """ZeRO 3: each parameter is cut into one piece a rank, the last one padded; trained pieces lie side by side in flat
    groups."""
    shape, piece = tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
    start = min(rank() * piece, parameter.ds_numel)
    length = min(piece, parameter.ds_numel - start)
    position = zero.grad_position.get(zero.get_param_id(parameter))
    if position is None:
        return Fragment(name, parameter, shape, start, length, True, parameter.ds_tensor, 0, None)
    group, offset, _ = position
    optimizer = zero.optimizer
    if (
        zero.offload_optimizer and zero.subgroup_to_device[group] != "cpu"
    ):  # a ratio below 1 leaves some groups on the GPU
        optimizer = zero.backup_optimizer
    return Fragment(
        name, parameter, shape, start, length, True, zero.fp32_partitioned_groups_flat[group], offset, optimizer
    )


def layout(engine: Any) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Name -> (shape, kinds) of everything ``read_state`` will give, in its order: a file's header can be written
    first."""
    return {fragment.name: (fragment.shape, fragment.kinds()) for fragment in fragments(engine)}


def steps(engine: Any) -> dict[str, int]:
    """Name -> how many updates the optimizer has made to it; parameters without an update are left out."""
    found: dict[str, int] = {}
    for fragment in fragments(engine):
        state = fragment.optimizer.state.get(fragment.master, {}) if fragment.optimizer else {}
        if "step" in state:
            found[fragment.name] = int(state["step"])
    return found


def read_state(engine: Any, bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, whole fp32 tensor) on rank 0, nothing on others; every rank must exhaust it.

    Takes one bucket of memory on the device, and on rank 0's host one tensor where that is larger. The tensors live
    until the next one is asked for; some are the engine's own memory. The ranks meet after each bucket: no collective
    waits for longer than rank 0 takes to write one, however long it takes to write all.
    """
    pieces = fragments(engine)
    kinds = {piece.name: piece.kinds() for piece in pieces}
    complete = world_size() == 1 or isinstance(engine.optimizer, torch.optim.Optimizer)  # rank 0 holds everything
    assembled = torch.empty(0)
    for bucket in buckets(pieces, kinds, bucket_bytes):
        if complete:
            for piece, kind, _, stop in bucket if is_main() else []:
                if stop == piece.numel:
                    yield piece.name, kind, piece.read(kind).view(piece.shape).float()
            barrier()
            continue
        buffer = torch.zeros(sum(span.numel for span in bucket), dtype=torch.float32, device=device())
        parts = buffer.split([span.numel for span in bucket])
        for span, part in zip(bucket, parts, strict=True):
            if span.piece.owned:
                local, there = span.here(span.piece.read(span.kind), part)
                there.copy_(local)
        # Summed as integers: all but one addend are 0, so the bits arrive as they are (floats would lose -0.0).
        dist.reduce(buffer.view(torch.int32), dst=0)
        for span, part in zip(bucket, parts, strict=True) if is_main() else []:
            piece = span.piece
            if span.whole:
                yield piece.name, span.kind, part.view(piece.shape)
                continue
            if span.start == 0:
                assembled = torch.empty(piece.numel)
            assembled[span.start : span.stop] = part
            if span.stop == piece.numel:
                yield piece.name, span.kind, assembled.view(piece.shape)
        barrier()


def restore_state(
    engine: Any,
    saved: dict[str, list[str]],
    saved_steps: dict[str, int],
    read: Callable[[str, str], Tensor],
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Puts whole tensors back, on every rank. ``saved`` (name -> kinds) and ``saved_steps`` are the same on all ranks
    and name every parameter; ``read(name, kind)`` is called on rank 0 alone. Moments of a parameter that is frozen now
    are left aside. One that is trained now but was not then starts with moments of zero, the step of the others and its
    weight as the average: at every ZeRO stage alike, where it may share a flat partition with them.
    """
    pieces = fragments(engine)
    _clear_moments(engine, pieces)
    _make_moments(pieces, saved, saved_steps)
    wanted = {piece.name: saved[piece.name] if piece.optimizer else [WEIGHT] for piece in pieces}
    tensor = torch.empty(0)
    for bucket in buckets(pieces, wanted, bucket_bytes):
        buffer = torch.empty(sum(span.numel for span in bucket), dtype=torch.float32, device=device())
        parts = buffer.split([span.numel for span in bucket])
        for span, part in zip(bucket, parts, strict=True) if is_main() else []:
            if span.start == 0:
                tensor = read(span.piece.name, span.kind).reshape(-1)
            part.copy_(tensor[span.start : span.stop])
        if world_size() > 1:
            dist.broadcast(buffer.view(torch.int32), src=0)
            barrier()  # see read_state
        for span, part in zip(bucket, parts, strict=True):
            local, there = span.here(span.piece.read(span.kind), part)
            local.copy_(there)
            if span.kind == WEIGHT:
                write_model_copy(span, part)
    for piece in pieces:
        if piece.optimizer is not None and AVERAGE in piece.kinds() and AVERAGE not in saved[piece.name]:
            piece.read(AVERAGE).copy_(piece.read(WEIGHT))
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.invalidate_secondary_tensor()  # ZeRO++ keeps a second copy of the weights within a node


def buckets(pieces: list[Fragment], kinds: dict[str, list[str]], bucket_bytes: int) -> Iterator[list[Span]]:
    """All tensors in order, as many as fit at a time; one that does not fit is cut, its stretches follow each other."""
    largest = max(1, bucket_bytes // 4)
    bucket: list[Span] = []
    size = 0
    for piece in pieces:
        for kind in kinds[piece.name]:
            for start in range(0, piece.numel, largest):
                span = Span(piece, kind, start, min(start + largest, piece.numel))
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
        local, there = span.here(parameter.ds_tensor.data.view(-1), values)
        local.copy_(there)
        if parameter.ds_status.name != "AVAILABLE":  # only small ("persistent") parameters are kept whole too
            return
    whole.view(-1)[span.start : span.stop].copy_(values)


def _clear_moments(engine: Any, pieces: list[Fragment]) -> None:
    for piece in pieces:
        if piece.optimizer is not None:
            piece.optimizer.state.pop(piece.master, None)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        engine.optimizer._hp_optimizer_states_linked = (
            False  # its links point into the tensors just dropped: made anew after a step
        )


def _make_moments(pieces: list[Fragment], saved: dict[str, list[str]], saved_steps: dict[str, int]) -> None:
    """Zero moments and the step, as the optimizer would make them on its first step. Parameters that share a flat
    partition share one step: the largest.
    """
    kinds = sorted({kind for names in saved.values() for kind in names} - {WEIGHT})
    newest = max(saved_steps.values(), default=0)
    for piece in pieces:
        if piece.optimizer is None or not kinds:
            continue
        state = piece.optimizer.state[piece.master]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(piece.master, requires_grad=False)
        step = max(saved_steps.get(piece.name, newest), int(state.get("step", 0)))
        state["step"] = _as_step(piece.optimizer, piece.master, step)


def _as_step(optimizer: torch.optim.Optimizer, master: Tensor, step: int) -> Any:
    """torch's optimizers count in a tensor (on the device only where their kernels want it there), DeepSpeed's in an
    int."""
    if not type(optimizer).__module__.startswith("torch."):
        return step
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(float(step), dtype=torch.float32, device=master.device if on_device else "cpu")
