"""``engine.compile``: the layers of the towers through torch.compile, each a region of its own.

A tower's layers are alike, so that one is compiled and the others reuse it: seconds instead of a minute for a whole
model, and what is around the layers (patch dropping, hooks, DeepSpeed) stays as it is.

    compile_layers(model, zero_stage=1)        # in place, parameter names unchanged
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from trainer.core import distributed
from trainer.core.types import UserError

BACKEND = "inductor"
OPTIONS = {"fallback_random": True}
"""Random numbers drawn as without compilation: pass 2 of a step and recomputation must drop what the first forward pass
dropped."""
RECOMPILE_LIMIT = 64
"""Both towers' layers are often one function, which torch compiles anew for each tower, pass 1 and pass 2, training and
evaluation, locked layers, adapters, a second size of micro-batch: 12 to 18 times in a run. From the 9th on, torch's
default, layers would run as without compilation."""


def compile_layers(model: nn.Module, zero_stage: int) -> int:
    """Compiles the forward of each layer of ``model`` in place, below recomputation and float32 wrappers; returns how
    many there are.

    Raises UserError for ZeRO-3, for a machine without a compiler, and for a model without lists of layers.
    """
    if zero_stage == 3:
        raise UserError(
            "engine.compile: ZeRO-3 fetches parameters by hooks that a compiled layer does not run; take an "
            "engine.ds_config of ZeRO 0 to 2, or engine.compile=false"
        )
    _require_compiler()
    layers = _layers(model)
    if not layers:
        raise UserError(f"engine.compile: {type(model).__name__} has no list of layers; set engine.compile=false")
    from torch._dynamo import config as dynamo_config  # takes most of a second to import

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, RECOMPILE_LIMIT)
    options: dict[str, Any] = {"options": OPTIONS} if BACKEND == "inductor" else {}
    for layer in layers:
        holder: Any = layer
        while hasattr(holder.forward, "forward"):  # Recomputed, InFloat32: what they wrap is compiled, not they
            holder = holder.forward
        holder.forward = torch.compile(holder.forward, backend=BACKEND, **options)
    return len(layers)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of several modules of one class."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(layer) for layer in module}) == 1:
            found += list(module)
        else:
            found += _layers(module)
    return found


def _require_compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "engine.compile: torch.compile needs a C++ compiler on every node (apt-get install g++, or set CXX)"
        )
    headers = sysconfig.get_path("include")
    searched = [headers, *os.environ.get("CPATH", "").split(os.pathsep)]  # compilers look in CPATH too
    if not any((Path(folder) / "Python.h").exists() for folder in searched if folder):
        raise UserError(
            f"engine.compile: torch.compile needs Python's headers, and {headers} has no Python.h "
            "(apt-get install python3-dev, or set CPATH to its folder)"
        )
    if distributed.device().type == "cuda" and not has_triton():
        raise UserError("engine.compile: torch.compile needs Triton and a GPU since Volta; set engine.compile=false")
