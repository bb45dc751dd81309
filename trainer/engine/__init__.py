"""Where tensors live: DeepSpeed behind a thin wrapper. Nothing outside this package imports deepspeed.

    from trainer.engine import EngineSettings, build_engine

The settings can be had without the seconds that importing DeepSpeed takes: ``build_engine`` and ``Engine`` load it on
first use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from trainer.engine.ds_config import EngineSettings

# DeepSpeed looks for an accelerator when it is first imported, and without one it must be told that the CPU is meant.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

if TYPE_CHECKING:
    from trainer.engine.engine import Engine, build_engine

__all__ = ["Engine", "EngineSettings", "build_engine"]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "build_engine"):
        from trainer.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
