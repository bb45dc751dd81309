"""A model whose gradients are chosen: what an optimizer makes of them can be compared bit for bit.

The loss is the inner product of the parameters and their wanted gradients. Those are small multiples of 1/64 and differ
between ranks, so that their mean over ranks is exact in float32 whatever the order.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from trainer.core.distributed import rank, world_size
from trainer.core.partitioned import PartitionedOptimizer
from trainer.engine.fragments import fragments
from trainer.optim import OptimizerSettings, build_optimizer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SHAPES = {
    "tall": (70, 33),
    "vector": (70,),
    "wide": (40, 129),
    "small": (5, 7),
    "kernel": (4, 3, 2, 2),
    "logit_scale": (1,),
}


class Held(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.held = nn.ModuleDict({name: Held(shape) for name, shape in SHAPES.items()})
        self.table = nn.Embedding(9, 33)

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        rows = self.table(torch.arange(9))
        return sum((self.held[n](wanted[n]) for n in SHAPES), (rows * wanted["table"]).sum())


def wanted(step: int) -> dict[str, Tensor]:
    """The gradients of a step."""
    draw = torch.Generator().manual_seed(step)
    shapes = {**SHAPES, "table": (9, 33)}
    return {name: torch.randint(-64, 65, shape, generator=draw) / 64 for name, shape in shapes.items()}


def on_rank(step: int) -> dict[str, Tensor]:
    """This rank's: their mean is ``wanted``."""
    sign = 0 if world_size() == 1 else (1 if rank() % 2 else -1)
    draw = torch.Generator().manual_seed(1000 + step)
    return {
        name: value + sign * torch.randint(-64, 65, value.shape, generator=draw) / 64
        for name, value in wanted(step).items()
    }


def alone(settings: OptimizerSettings, steps: int) -> dict[str, Tensor]:
    """Weights after steps of the recipe's optimizer without any engine."""
    model = Model()
    optimizer = build_optimizer(model, settings)  # type: ignore[arg-type]
    for step in range(steps):
        model(wanted(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def make_engine(settings: OptimizerSettings, stage: int, offload: bool = False, seed: int = 0) -> Any:
    """The same under DeepSpeed, as trainer.engine sets it up."""
    model = Model(seed)
    optimizer = build_optimizer(model, settings)  # type: ignore[arg-type]
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if isinstance(optimizer, PartitionedOptimizer):
        optimizer.locate(fragments(engine), partitioned=stage > 0)
    return engine


def train(engine: Any, first: int, last: int) -> None:
    """Steps [first, last)."""
    for step in range(first, last):
        engine.backward(engine(on_rank(step)))
        engine.step()
