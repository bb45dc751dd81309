"""A frozen base in 8 or 4 bits under a float32 adapter, through bitsandbytes: LLM.int8() (arXiv 2208.07339), NF4 (arXiv
2305.14314).

    model: {path: google/siglip-so400m-patch14-384, lora: {base: nf4}}

The linear layers of the transformer blocks are quantised, all else stays float32. Training sees the rounded weights;
what is exported is the adapter, or the adapter merged into the base as it is in ``model.path``. Tested on bitsandbytes'
CPU kernels: speed and memory on a GPU are unmeasured.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.core.types import UserError
from trainer.models.param_groups import in_layer

QUANTIZED = ("int8", "nf4")


def has_gpu() -> bool:
    """Whether bitsandbytes' kernels have a device that they are made for."""
    return torch.cuda.is_available()


def quantize(towers: PreTrainedModel, kind: str) -> None:
    """Replaces the frozen linear layers of the transformer blocks; weights are packed when the model moves to its
    device.

    Raises UserError without bitsandbytes or a GPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.lora.base {kind} needs bitsandbytes: pip install bitsandbytes, or take bfloat16 or float16"
        )
    if not has_gpu():
        raise UserError(f"model.lora.base {kind} needs a GPU, and there is none: take bfloat16, float16, or float32")
    for name, module in list(towers.named_modules()):
        if type(module) is nn.Linear and in_layer(name):
            parent, _, last = name.rpartition(".")
            setattr(towers.get_submodule(parent), last, _packed(module, kind))
    setattr(
        towers, {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}[kind], True
    )  # PEFT chooses its layers by this


def _computes_in() -> torch.dtype:
    """What the GPU has units for."""
    before_ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return torch.float16 if before_ampere else torch.bfloat16


def _packed(layer: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes

    sizes: dict[str, Any] = {
        "input_features": layer.in_features,
        "output_features": layer.out_features,
        "bias": layer.bias is not None,
    }
    if kind == "int8":
        packed = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False)
    else:
        packed = bitsandbytes.nn.Linear4bit(**sizes, compute_dtype=_computes_in(), quant_type="nf4")
    packed.load_state_dict(layer.state_dict())
    return packed.requires_grad_(False)
