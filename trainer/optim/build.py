"""Builds the optimizer of a recipe, and tells how much memory it needs.

optimizer = build_optimizer(model, settings)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer.core.types import UserError
from trainer.optim.elementwise import Lion, LowPrecisionAdamW
from trainer.optim.moments import bytes_per_element
from trainer.optim.settings import OptimSettings
from trainer.optim.tensorwise import Adafactor, Lamb, Muon, is_factored


def build_optimizer(
    model: nn.Module, settings: OptimSettings, groups: Iterable[tuple[list[str], float, bool]] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters. ``groups`` says (names, factor on the rate, decayed?), as
    ``DualEncoder.parameter_groups`` does; without it all learn at one rate, and those of one dimension or none (norms,
    biases, scale, bias) are not decayed.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError(
            "model: every parameter is locked, so there is nothing to train; unlock a tower, or the scale and bias"
        )
    if groups is None:
        groups = [
            ([name for name, p in trainable.items() if (p.dim() > 1) is decayed], 1.0, decayed)
            for decayed in (True, False)
        ]
    # ``rate`` is what Engine.set_learning_rate multiplies by.
    options: list[dict[str, Any]] = [
        {
            "params": [trainable[name] for name in names],
            "rate": rate,
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for names, rate, decayed in groups
        if names
    ]
    return _make(model, trainable, options, settings)


def _make(
    model: nn.Module, named: dict[str, nn.Parameter], groups: list[dict[str, Any]], settings: OptimSettings
) -> torch.optim.Optimizer:
    if settings.name == "lion":
        return Lion(named, groups, lr=settings.peak, betas=_betas(settings), moments=settings.moments)
    common: dict[str, Any] = {"lr": settings.peak, "betas": _betas(settings), "eps": settings.eps}
    if settings.name == "muon":
        return Muon(named, groups, matrices=matrices(model), momentum=settings.momentum, **common)
    if settings.name == "adafactor":
        return Adafactor(named, groups, moments=settings.moments, **common)
    if settings.name == "lamb":
        return Lamb(named, groups, moments=settings.moments, **common)
    if settings.moments != "float32":
        return LowPrecisionAdamW(named, groups, moments=settings.moments, **common)
    # The fused kernel works on CPU tensors too (offloaded optimizer states) and needs no compiler, as DeepSpeed's own
    # does.
    return torch.optim.AdamW(groups, **common, fused=True)


def _betas(settings: OptimSettings) -> tuple[float, float]:
    return settings.beta1, settings.beta2


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon makes orthogonal: of two dimensions, and no table of embeddings."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in tables}


Shapes = dict[tuple[tuple[int, ...], bool], int]
"""(shape, is it one of ``matrices``?) -> how many trained parameters are like that."""


def trained_shapes(model: nn.Module) -> Shapes:
    """What ``moment_bytes`` needs to know of a model."""
    hidden = matrices(model)
    return dict(Counter((tuple(p.shape), name in hidden) for name, p in model.named_parameters() if p.requires_grad))


def moment_bytes(settings: OptimSettings, shapes: Shapes) -> float:
    """Bytes of the moments of all trained parameters, on all ranks together."""
    return float(sum(many * _bytes_of(settings, shape, matrix) for (shape, matrix), many in shapes.items()))


def _bytes_of(settings: OptimSettings, shape: tuple[int, ...], matrix: bool) -> float:
    numel = math.prod(shape)
    if settings.name == "muon":
        return numel * (4.0 if matrix else 8.0)
    each = bytes_per_element(settings.moments, numel)
    if settings.name == "lion":
        return numel * each
    if settings.name == "adafactor":
        return numel * each + 4.0 * (sum(shape) if is_factored(shape) else numel)
    return 2 * numel * each
