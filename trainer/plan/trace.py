"""One micro-batch of training traced under fake tensors: live bytes, operations and traffic, without weights and
without a GPU.

    with FakeTensorMode():
        recorder = Recorder(model.parameters())
        with recorder:
            loss = forward()
            recorder.turn()
            loss.backward()
        trace = recorder.trace()

Every operator of the forward and backward pass goes through a dispatch mode that notes which storages exist after it:
what an allocator would hand out, rounding and fragmentation aside. Equal layers need not all be run: ``Trace.spliced``
repeats the stretch between two marks. All numbers are affine in the number of rows, so two traces of different size
give every other size (``trainer.plan.profile.Curve``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Floats = NDArray[np.float64]
ASKS_FOR_DEVICE = torch.ops.prim.device.default  # of fake tensors this is an operator, and the most frequent one
NEVER = 2**62  # the end of a storage that outlives the trace
# The CPU's attention has no entry in torch's registry: two products forward, five backward.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # the only view whose schema does not say so


@dataclass(frozen=True)
class Trace:
    """What one pass did, operator by operator (arrays of equal length)."""

    live: Floats
    """Bytes of tensors made by the pass and alive after each operator; finished gradients of parameters left out."""
    gradients: Floats
    """Bytes of parameter gradients finished by then."""
    flops: Floats
    flops32: Floats
    """Those of them that multiply float32 numbers: under autocast, what is kept out of it."""
    traffic: Floats
    """Bytes that each operator reads and writes."""
    lives: NDArray[np.int64]
    """[storages, 3]: the operator that made each storage, the first one that ran without it, and its bytes; in order of
    birth."""
    host: Floats
    """Bytes of activations parked in host memory by then."""
    turn: int
    """Operators of the forward pass; the backward pass begins there."""

    @property
    def saved(self) -> float:
        """Bytes alive when the forward pass ended: what autograd keeps for the backward pass."""
        return float(self.live[self.turn - 1])

    def spliced(self, start: int, stop: int, times: int) -> Trace:
        """This trace with operators [start, stop) run ``times`` more, each time with the same changes of memory.

        Args:
            start, stop: a stretch that leaves memory in the state it found, plus what one period adds (a layer, forward
            or backward).
        """
        length = (stop - start) * times
        if length == 0:
            return self
        lives = self.lives.copy()
        lives[:, :2] += np.where((lives[:, :2] >= stop) & (lives[:, :2] < NEVER), length, 0)
        live = np.cumsum(_repeated(np.diff(self.live, prepend=0.0), start, stop, times))
        # What every period makes and one later event frees at once (autocast's cache of weights) is freed for the new
        # periods too.
        first, second = np.searchsorted(self.lives[:, 0], [start, stop])
        period, following = self.lives[first:second], self.lives[second : 2 * second - first]
        together = np.flatnonzero((period[: len(following), 1] == following[:, 1]) & (following[:, 1] < NEVER))
        for _, death, size in lives[first:second][together]:
            live[death:] -= times * size
        return replace(
            self,
            live=live,
            gradients=np.cumsum(_repeated(np.diff(self.gradients, prepend=0.0), start, stop, times)),
            host=np.cumsum(_repeated(np.diff(self.host, prepend=0.0), start, stop, times)),
            flops=_repeated(self.flops, start, stop, times),
            flops32=_repeated(self.flops32, start, stop, times),
            traffic=_repeated(self.traffic, start, stop, times),
            lives=lives,
            turn=self.turn + (length if stop <= self.turn else 0),
        )


def _repeated(values: Floats, start: int, stop: int, times: int) -> Floats:
    return np.concatenate([values[:stop], np.tile(values[start:stop], times), values[stop:]])


class Recorder(TorchDispatchMode):
    """Counts live storages, operations and traffic of the operators that run inside it.

    Args:
        parameters: those whose gradients are booked apart (frozen ones are passed over).
    """

    def __init__(self, parameters: Iterable[Parameter] = ()) -> None:
        super().__init__()
        self.live = 0
        self.host = 0
        """Bytes parked in host memory: whoever parks them says so."""
        self._turn = 0
        self._finished = 0
        self._known: dict[int, int] = {}
        self._lives: list[list[int]] = []
        self._columns: tuple[list[float], ...] = ([], [], [], [], [], [])
        self._hooks = [p.register_post_accumulate_grad_hook(self._book) for p in parameters if p.requires_grad]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is ASKS_FOR_DEVICE:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._see(tensor, made_here=False)
        for tensor in outputs:
            self._see(tensor, made_here=True)
        operations, moved = _operations(func, args, kwargs or {}, out), _traffic(func, inputs, outputs)
        self._note(operations, operations if inputs and inputs[0].dtype == torch.float32 else 0.0, moved)
        return out

    def turn(self) -> None:
        """The forward pass ends here."""
        self._turn = self.steps

    @property
    def turned(self) -> bool:
        """True in the backward pass."""
        return self._turn > 0

    @property
    def steps(self) -> int:
        """Operators so far."""
        return len(self._columns[0])

    def trace(self) -> Trace:
        """What was recorded; the recorder is done."""
        for hook in self._hooks:
            hook.remove()
        self._note(0.0, 0.0, 0.0)  # what the last operator left behind shows only now
        columns = [np.array(column, dtype=np.float64) for column in self._columns]
        live, gradients, flops, flops32, traffic, host = columns
        lives = np.array(self._lives, dtype=np.int64).reshape(-1, 3)
        return Trace(live - gradients, gradients, flops, flops32, traffic, lives, host, self._turn or len(live))

    def _note(self, flops: float, flops32: float, traffic: float) -> None:
        values = (self.live, self._finished, flops, flops32, traffic, self.host)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def _book(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._finished += parameter.grad.untyped_storage().nbytes()

    def _see(self, tensor: Tensor, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here and tensor.device.type != "meta" else 0
        self._known[key] = len(self._lives)
        self._lives.append([self.steps, NEVER, size])
        self.live += size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        life = self._lives[self._known.pop(key)]
        life[1] = self.steps
        self.live -= life[2]


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    packet = getattr(func, "overloadpacket", func)
    if packet in (FLASH, FLASH_BACKWARD):
        query, key = args[:2] if packet is FLASH else args[1:3]
        return (4.0 if packet is FLASH else 10.0) * query.numel() * key.shape[-2]
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def _traffic(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    schema = func._schema
    if func is UNSAFE_VIEW:
        return 0.0
    if not schema.is_mutable and schema.returns and all(value.alias_info is not None for value in schema.returns):
        return 0.0  # a view
    return float(sum(t.nbytes for t in inputs) + sum(t.nbytes for t in outputs))
