"""Runs an example of tests/examples on forked ranks and compares every gradient with a dense float64 computation.

    errors = gradient_errors("ddp", TwoTowers, dense_losses.sigmoid)         # {"step 0 image.1.weight": 1e-7, ...}

Nothing of the example is replaced: hooks of torch note what its model is given and what its optimizer meets.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from tests.support.dense_losses import relative
from tests.support.forked_ranks import run_ranks
from trainer.core.types import Embeddings

WORLD = 2
State = dict[str, Tensor]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Step(NamedTuple):
    """What an optimizer met on one rank, and the inputs that led to it."""

    inputs: list[Inputs]
    weights: State
    gradients: State


def gradient_errors(
    example: str,
    plain: Callable[[], nn.Module],
    dense: Callable[[Embeddings], Tensor],
    *,
    one_batch: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Relative error of each parameter's gradient at each optimizer step of ``main(**options)``.

    Args:
        plain: makes the example's model without a wrapper.
        one_batch: all that a step saw is one global batch; otherwise each forward pass on all ranks is one, and the
            step's loss is their mean.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = run_ranks(_run, WORLD, example, type(plain()), port, options)
    errors: dict[str, float] = {}
    for number, steps in enumerate(zip(*ranks, strict=True)):
        batches = [_joined(parts) for parts in zip(*(step.inputs for step in steps), strict=True)]
        wanted = _reference(plain(), steps[0].weights, [_joined(batches)] if one_batch else batches, dense)
        assert wanted.keys() == steps[0].gradients.keys()
        for rank, step in enumerate(steps):
            for name, gradient in step.gradients.items():
                errors[f"step {number} rank {rank} {name}"] = relative(gradient, wanted[name])
    return errors


def _run(example: str, model_type: type[nn.Module], port: str, options: dict[str, Any]) -> list[Step]:
    """On a rank."""
    os.environ.update(LOCAL_WORLD_SIZE=str(WORLD), MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    torch.manual_seed(0)  # FSDP2 sends no weights to other ranks: equal seeds make them equal
    inputs: list[Inputs] = []
    met: list[tuple[list[Inputs], dict[int, tuple[Tensor, Tensor]]]] = []

    call = nn.Module.__call__

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module, model_type) and torch.is_grad_enabled():
            inputs.append(tree_map(lambda leaf: leaf.detach().clone(), (args, kwargs)))
        return call(module, *args, **kwargs)

    def note_step(optimizer: Any, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        met.append((inputs.copy(), {id(p): (_whole(p), _whole(p.grad)) for p in parameters}))
        inputs.clear()

    register_optimizer_step_pre_hook(note_step)
    nn.Module.__call__ = noting  # type: ignore[method-assign]
    model = importlib.import_module(f"tests.examples.{example}").main(**options)
    model = next(module for module in model.modules() if isinstance(module, model_type))
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        Step(seen, {names[k]: w for k, (w, _) in step.items()}, {names[k]: g for k, (_, g) in step.items()})
        for seen, step in met
    ]


def _whole(value: Tensor | None) -> Tensor:
    assert value is not None, "a parameter without a gradient"
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def _joined(parts: Any) -> Inputs:
    """The inputs of several calls as those of one."""
    args = tuple(torch.cat(tensors) for tensors in zip(*(part[0] for part in parts), strict=True))
    return args, {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}


def _reference(model: nn.Module, weights: State, batches: list[Inputs], dense: Callable[[Embeddings], Tensor]) -> State:
    """Gradients of the mean over ``batches`` of the dense loss, in float64."""
    model = model.double().train()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    for batch in batches:
        args, kwargs = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batch)
        out = model(*args, **kwargs)
        z = Embeddings(*(out[name] for name in ("image_features", "text_features", "logit_scale", "logit_bias")))
        (dense(z) / len(batches)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
