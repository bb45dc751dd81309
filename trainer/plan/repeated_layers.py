"""Deep towers are stacks of equal layers: trace a few, repeat the middle ones.

A tower of 40 layers costs 40 times the tracing of one, and nothing new is learned after the first. ``Shortened`` cuts
every stack of equal layers of a model to a few and marks where one period begins and ends, forward and backward;
``Shortened.restore`` puts the missing layers back into the trace, operator for operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainer.engine.precision import InFloat32
from trainer.plan.trace import Recorder, Trace

FIRST = 2  # around the first layers memory is not yet periodic: whoever called the stack still holds its input


@dataclass
class _Stack:
    """One cut list of layers: ``missing`` periods, and the operators [start, stop) of one period in each direction."""

    missing: int
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)


class Shortened:
    """Cuts the stacks of ``model`` in place to a few layers; those from the third on stand for the missing ones.

    Args:
        period: layers after which the pattern of recomputation repeats (1 unless only every k-th layer is recomputed).
    """

    def __init__(self, model: nn.Module, period: int = 1) -> None:
        self.recorder: Recorder | None = None
        self._stacks: list[_Stack] = []
        self._handles: list[Any] = []
        for layers in list(stacks(model)):
            first = max(FIRST, period)
            keep = first + 2 * period  # the period that is repeated, with a whole one before and after it
            keep += (len(layers) - keep) % period
            if len(layers) <= keep:
                continue
            stack = _Stack(missing=(len(layers) - keep) // period)
            del layers[keep:]
            self._stacks.append(stack)
            for index, mark in ((first, "first"), (first + period, "second")):
                self._handles.append(
                    layers[index].register_forward_pre_hook(self._marker(stack, mark), with_kwargs=True)
                )

    def restore(self, trace: Trace) -> Trace:
        """The trace of the whole model, from that of the shortened one."""
        stretches = []
        for stack in self._stacks:
            if "second" in stack.forward:
                stretches.append((stack.forward["first"], stack.forward["second"], stack.missing))
            if "first" in stack.backward:
                stretches.append((stack.backward["second"], stack.backward["first"], stack.missing))
            stack.forward.clear()
            stack.backward.clear()
        for start, stop, times in sorted(stretches, reverse=True):
            trace = trace.spliced(start, stop, times)
        return trace

    def _marker(self, stack: _Stack, mark: str) -> Any:
        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder = self.recorder
            if recorder is None or recorder.turned:
                return  # a layer that is recomputed in the backward pass comes by again
            stack.forward[mark] = recorder.steps
            hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: stack.backward.__setitem__(mark, recorder.steps))

        return entered


def stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of equal layers in ``model``; one whose layers are frozen or kept in float32 unevenly is
    not one."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({_kind(layer) for layer in child}) == 1:
            yield child
        else:
            yield from stacks(child)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), weights, tuple(isinstance(module.forward, InFloat32) for module in layer.modules())
