"""The precision of the towers: float32, or 16 bits under autocast; weights, gradients, moments and loss stay float32.

float16 has 11 significant bits (bfloat16: 8), but a range of only 6e-8 to 65504. What is known to leave that range:

- The gradient, being small: ``LossScale``.
- Softmax and norms: torch computes them in float32 (autocast casts norms, attention kernels accumulate in float32), and
  the residual stream of CLIP, SigLIP and SigLIP 2 is float32 because it starts from float32 position embeddings.
- Linear layers of single models: T5 and mT5 text towers (huggingface/transformers#10956, mlfoundations/open_clip#302),
  some SigLIP descendants (vllm-project/vllm#40290). ``find_overflow`` names the layer, ``engine.float32_modules`` keeps
  it in float32. OpenAI trained CLIP in fp16, ViT-L/14-336 included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from trainer.core import distributed
from trainer.core.types import UserError

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIRST_SCALE, LEAST_SCALE, GOOD_STEPS = 2.0**16, 1.0, 1000


def best_precision() -> Precision:
    """bf16 on GPUs since Ampere and on processors with AMX, fp16 on Volta and Turing GPUs (V100, T4, RTX 20xx, GTX
    16xx), fp32 elsewhere, where 16 bits are emulated (measured on AVX2: an eighth of the fp32 rate)."""
    if not torch.cuda.is_available():
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability() >= (7, 0) else "fp32"


def require_float32() -> None:
    """Disables TF32 in matrix products and convolutions; torch enables it for cuDNN by default (a patch embedding would
    keep 11 of 24 bits)."""
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = backends.cudnn.fp32_precision = "ieee"
    backends.cudnn.allow_tf32 = False  # torch's older API for the same: convolutions have no setting of their own there


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2) that loses no batch.

    A step whose gradient overflows on any rank is repeated at half the scale; after ``good_steps`` steps without an
    overflow the scale doubles. The scale applies between the embeddings and the weights only: it multiplies the
    gradient of the outputs of ``forward`` and divides the gradient of each parameter as it arrives, so that reduction,
    norm and clipping see true gradients. It is a power of two, so both are exact in float32.
    """

    def __init__(self, value: float = FIRST_SCALE, good_steps: int = GOOD_STEPS) -> None:
        self.value, self.good_steps = value, good_steps
        self.num_overflows = 0
        """Number of repeated steps in this run."""
        self._good_in_a_row = 0
        self._at_start: float | None = None
        """The scale at the start of a step in which it was lowered."""

    def unscale_gradients_of(self, model: nn.Module) -> None:
        """From now on, divides the gradients of the trainable parameters by the scale."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / self.value)

    def scale_gradients_of(self, outputs: Any) -> Any:
        """Returns ``outputs`` of a forward pass with hooks that multiply their gradients by the scale."""

        def scaled(output: Any) -> Any:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: gradient * self.value)
            return output

        return tree_map(scaled, outputs)

    def lower(self) -> bool:
        """Halves the scale to repeat a step that overflowed; False if it is minimal, so that it cannot be the cause."""
        if self.value <= LEAST_SCALE:
            return False
        if self._at_start is None:
            self._at_start = self.value
        self.value /= 2
        self.num_overflows += 1
        self._good_in_a_row = 0
        return True

    def end_step(self, finite: bool) -> None:
        """Doubles the scale after ``good_steps`` in a row. If no scale makes the gradient ``finite``, restores it."""
        if finite:
            self._good_in_a_row += 1
            if self._good_in_a_row == self.good_steps:
                self.value *= 2
                self._good_in_a_row = 0
        elif self._at_start is not None:
            self.value = self._at_start
        self._at_start = None

    def state_dict(self) -> dict[str, float]:
        """The state that exact resume needs; plain numbers."""
        return {"value": self.value, "num_overflows": self.num_overflows, "good_in_a_row": self._good_in_a_row}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the result of ``state_dict``."""
        self.value, self.num_overflows = float(state["value"]), int(state["num_overflows"])
        self._good_in_a_row = int(state["good_in_a_row"])


def autocast_forward(
    model: nn.Module, dtype: torch.dtype, scale: LossScale | None = None, device: str | None = None
) -> None:
    """Makes ``model.forward`` compute in ``dtype`` under torch autocast, weights and gradients staying float32.

    ``device`` is the kind of device (None: this rank's).

    Around the model and not around the engine, because DeepSpeed switches an autocast from outside off; and not through
    DeepSpeed's ``torch_autocast`` or ``fp16``, because the one averages the gradients of linear layers in 16 bits (the
    result would depend on the ZeRO stage and on the number of micro-batches) and the other holds the weights in them.
    """
    forward: Callable[..., Any] = model.forward
    kind = device or distributed.device().type
    if scale is not None:
        scale.unscale_gradients_of(model)

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype):
            outputs = forward(*args, **kwargs)
        return outputs if scale is None else scale.scale_gradients_of(outputs)

    model.forward = autocast


def keep_float32(model: nn.Module, patterns: tuple[str, ...], device: str | None = None) -> None:
    """Modules whose full name matches one of the regular ``patterns`` (anywhere) compute in float32 under the autocast
    of ``device``, a kind of device (None: this rank's)."""
    for pattern in patterns:
        try:
            found = [module for name, module in model.named_modules() if name and re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"engine.float32_modules {pattern!r} is not a valid regular expression ({error})"
            ) from error
        if not found:
            raise UserError(f"engine.float32_modules {pattern!r} matches no module; names look like {_example(model)}")
        for module in found:
            module.forward = InFloat32(module.forward, device or distributed.device().type)


class InFloat32:
    """A module's ``forward`` outside autocast, its inputs cast to float32."""

    def __init__(self, forward: Callable[..., Any], device: str) -> None:
        self.forward, self.device = forward, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, enabled=False):
            return self.forward(*tree_map(_upcast, args), **tree_map(_upcast, kwargs))


def _upcast(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _example(model: nn.Module) -> str:
    return next(name for name, module in reversed(list(model.named_modules())) if isinstance(module, nn.Linear))


@contextmanager
def find_overflow(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, collects the name of each innermost module that turns finite inputs into non-finite outputs."""
    found: list[str] = []

    def finite(values: Any) -> bool:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point()]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if finite(inputs) and not finite(output):
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
