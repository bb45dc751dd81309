"""A thin wrapper around DeepSpeed. Nothing outside this package imports deepspeed.

    from trainer.engine import EngineSettings, build_engine

Importing the settings does not import DeepSpeed, which takes seconds: ``build_engine`` and ``Engine`` do on first use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from trainer.engine.ds_config import EngineSettings

# DeepSpeed looks for an accelerator when first imported; without one it must be told to use the CPU.
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
