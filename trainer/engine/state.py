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
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from trainer.core.collectives import barrier
from trainer.core.distributed import device, is_main, world_size
from trainer.core.partitioned import Dense, PartitionedOptimizer
from trainer.core.types import UserError
from trainer.engine.fragments import BUCKET_BYTES, Fragment, buckets, fragments, write_model_copy
from trainer.engine.state_names import AVERAGE, WEIGHT


def layout(engine: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name -> kind -> shape of everything ``read_state`` will give, in its order: a file's header can be written
    first."""
    return {fragment.name: fragment.kinds() for fragment in fragments(engine)}


def steps(engine: Any) -> dict[str, int]:
    """Name -> how many updates the optimizer has made to it; parameters without an update are left out."""
    found: dict[str, int] = {}
    for fragment in fragments(engine):
        if "step" in fragment.state:
            found[fragment.name] = int(fragment.state["step"])
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
            for span in bucket if is_main() else []:
                if span.last:
                    yield span.piece.name, span.kind, span.piece.read(span.kind).view(span.shape).float()
            barrier()
            continue
        buffer = torch.zeros(sum(span.numel for span in bucket), dtype=torch.float32, device=device())
        parts = buffer.split([span.numel for span in bucket])
        for span, part in zip(bucket, parts, strict=True):
            span.gather(part)
        # Summed as integers: all but one addend are 0, so the bits arrive as they are (floats would lose -0.0).
        dist.reduce(buffer.view(torch.int32), dst=0)
        for span, part in zip(bucket, parts, strict=True) if is_main() else []:
            piece = span.piece
            if span.whole:
                yield piece.name, span.kind, part.view(span.shape)
                continue
            if span.start == 0:
                assembled = torch.empty(prod(span.shape))
            assembled[span.start : span.stop] = part
            if span.last:
                yield piece.name, span.kind, assembled.view(span.shape)
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
    _check_moments(pieces, saved)
    _clear_moments(engine, pieces)
    _make_moments(pieces, saved, saved_steps)
    wanted = {
        piece.name: {kind: shape for kind, shape in piece.kinds().items() if kind in saved[piece.name]}
        for piece in pieces
    }
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
            local, there, many = span.overlap()
            if many:
                span.piece.write(span.kind, local, part[there : there + many])
            if span.kind == WEIGHT:
                write_model_copy(span, part)
    for piece in pieces:
        if piece.optimizer is not None and AVERAGE in piece.kinds() and AVERAGE not in saved[piece.name]:
            piece.read(AVERAGE).copy_(piece.read(WEIGHT))
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.invalidate_secondary_tensor()  # ZeRO++ keeps a second copy of the weights within a node


def _check_moments(pieces: list[Fragment], saved: dict[str, list[str]]) -> None:
    """Raises UserError where another optimizer's moments are saved than this one keeps."""
    for piece in pieces:
        there = set(saved[piece.name]) - {WEIGHT, AVERAGE}
        if isinstance(piece.optimizer, PartitionedOptimizer):
            here = set(piece.optimizer.moments(piece))
        elif isinstance(piece.optimizer, torch.optim.AdamW):
            here = {"exp_avg", "exp_avg_sq"}
        else:
            continue
        if there and there != here:
            raise UserError(
                f"the checkpoint was made with another optimizer: it keeps {', '.join(sorted(there))} of {piece.name}, "
                f"this one {', '.join(sorted(here))}; set optim.name back, or begin a run in another run.directory "
                "from its export (model.path)"
            )


def _clear_moments(engine: Any, pieces: list[Fragment]) -> None:
    for piece in pieces:
        if piece.optimizer is not None:
            piece.optimizer.state.pop(piece.key, None)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        engine.optimizer._hp_optimizer_states_linked = (
            False  # its links point into the tensors just dropped: made anew after a step
        )


def _make_moments(pieces: list[Fragment], saved: dict[str, list[str]], saved_steps: dict[str, int]) -> None:
    """Zero moments and the step, as the optimizer would make them on its first step. Parameters that share a flat
    partition share one step: the largest.
    """
    kinds = sorted({kind for names in saved.values() for kind in names} - {WEIGHT})
    averages = AVERAGE in kinds
    newest = max(saved_steps.values(), default=0)
    for piece in pieces:
        if piece.optimizer is None or not kinds:
            continue
        if isinstance(piece.optimizer, PartitionedOptimizer):
            state = piece.optimizer.prepare(piece)
            state["step"] = saved_steps.get(piece.name, newest)
            if averages:
                state[AVERAGE] = Dense(torch.zeros_like(piece.weight))
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
