"""Surveys any module for the planner, by tracing it with given inputs.

survey = survey_module(model, (images, texts), precision="bf16")

Nothing is known of the module but what it does: there is no variant of it with recomputation or LoRA, equal layers are
all traced, and forward must not look at the values of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call

from trainer.core.types import UserError
from trainer.engine.precision import DTYPES
from trainer.optim import trained_shapes
from trainer.plan.device import Device, Parking, as_on
from trainer.plan.profile import SIZES, Curve, Survey
from trainer.plan.trace import Recorder, Trace


def survey_module(model: nn.Module, inputs: Sequence[Tensor], precision: str, device: Device = "cuda") -> Survey:
    """Traces one micro-batch of ``model(*inputs)`` forward and backward; neither weights nor inputs are touched.

    Args:
        model: on any device, meta included; in training mode or not, as it will be trained.
        inputs: examples with a row for each pair; only shapes and dtypes count. The first is taken for the image.
        precision: bf16 or fp16 (autocast), or fp32.

    Raises:
        UserError: the outputs hold no embeddings [rows, width], nothing is trainable, or forward looks at values.
    """
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise UserError("plan: every parameter of the module is locked, there is nothing to train")
    if not inputs:
        raise UserError("plan: a module needs inputs=(images, texts), examples with a row for each pair")
    bytes_of = [tensor[:1].nbytes for tensor in inputs]
    with FakeTensorMode(allow_non_fake_inputs=True), as_on(device) as parking:
        weights = {
            name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            for name, p in model.named_parameters()
        }
        buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        fake = weights, buffers
        found = [_trace(model, fake, inputs, rows, precision, True, parking) for rows in SIZES]
        training = Curve.through(*(trace for trace, _ in found))
        inference = Curve.through(*(_trace(model, fake, inputs, rows, precision, False, parking)[0] for rows in SIZES))
    sizes = sorted({p.numel() for p in parameters})
    return Survey(
        count=sum(p.numel() for p in parameters),
        parameters=sum(p.nbytes for p in parameters),
        trainable=4 * sum(p.numel() for p in trainable),
        largest=4 * max(p.numel() for p in trainable),
        small={n: sum(p.nbytes for p in parameters if p.numel() == n) for n in sizes},
        buffers=sum(b.nbytes for b in model.buffers()),
        embed_dim=found[0][1],
        image_bytes=bytes_of[0],
        token_bytes=sum(bytes_of[1:]),
        towers_trained=(True, True),
        training=training,
        inference=inference,
        shapes=trained_shapes(model),
        device=device,
        note="a module of your own, as it is: no recomputation or LoRA is tried on it",
    )


def _trace(
    model: nn.Module, fake: Any, inputs: Sequence[Tensor], rows: int, precision: str, training: bool, parking: Parking
) -> tuple[Trace, int]:
    """One micro-batch, and the width of the embeddings."""
    weights, _ = fake
    batch = tuple(torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    recorder = parking.recorder = Recorder(weights.values())
    try:
        with recorder, torch.set_grad_enabled(training):
            with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
                outputs = functional_call(model, fake, batch)
            features = [value for value in _tensors(outputs) if value.dim() == 2 and value.shape[0] == rows]
            if not features:
                raise UserError("plan: the module returns no embeddings, tensors [rows, width]")
            width = features[0].shape[1]
            if training:
                leaves = [torch.zeros_like(value) for value in features]
                terms = [torch.sum(a * b) for a, b in zip(features, leaves, strict=True) if a.requires_grad]
                total = torch.stack(terms).sum()
                recorder.turn()
                del outputs, features, terms
                total.backward()
                del total
    except DataDependentOutputException as error:
        raise UserError(
            f"plan: forward depends on the values of its inputs ({error}), which a forecast does not have"
        ) from None
    for weight in weights.values():
        weight.grad = None
    return recorder.trace(), width


def _tensors(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [value for value in values if isinstance(value, Tensor)]
