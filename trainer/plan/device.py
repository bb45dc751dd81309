"""Emulates, while a model is traced on the CPU, what another device does differently.

with FakeTensorMode(), as_on("cuda") as parking:
    ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from trainer.plan.trace import Recorder

Device = Literal["cpu", "cuda"]


class Parking:
    """Stands for host memory: what is parked there leaves the device's account and enters the host's."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None

    def hooks(self, pin_memory: bool = False, device_type: str = "cuda") -> Any:
        def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            assert self.recorder is not None
            self.recorder.host += tensor.nbytes
            return tensor.shape, tensor.dtype

        def unpack(parked: tuple[torch.Size, torch.dtype]) -> Tensor:
            return torch.empty(parked[0], dtype=parked[1])

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextlib.contextmanager
def as_on(device: Device) -> Iterator[Parking]:
    """The traced tensors say "cpu", since a PyTorch without CUDA refuses fake ones; what a GPU does otherwise is put in
    its place here."""
    parking = Parking()
    layer_norm, save_on_cpu = F.layer_norm, torch.autograd.graph.save_on_cpu

    def layer_norm_in_float32(
        input: Tensor, shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # CUDA's autocast runs norms in float32, the CPU's in what comes
            input = input.float()
        return layer_norm(input, shape, weight, bias, eps)

    def full_grids(weights: Tensor, shapes: Tensor, max_length: int) -> Tensor:
        rows = F.interpolate(weights.permute(2, 0, 1)[None], size=(1, max_length), mode="bilinear")
        return rows.reshape(-1, max_length).T.expand(len(shapes), -1, -1).clone()

    # NaFlex reads the shape of each image's grid, which a fake tensor does not have: the budget is taken to be full.
    own_grids = Siglip2VisionEmbeddings.resize_positional_embeddings
    setattr(Siglip2VisionEmbeddings, "resize_positional_embeddings", staticmethod(full_grids))  # noqa: B010 (mypy knows it as a method)
    if device == "cuda":
        F.layer_norm = layer_norm_in_float32  # type: ignore[assignment]
        torch.autograd.graph.save_on_cpu = parking.hooks  # type: ignore[assignment,misc]
    try:
        yield parking
    finally:
        setattr(Siglip2VisionEmbeddings, "resize_positional_embeddings", staticmethod(own_grids))  # noqa: B010
        F.layer_norm = layer_norm
        torch.autograd.graph.save_on_cpu = save_on_cpu  # type: ignore[misc]
