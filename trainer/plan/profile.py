"""Surveys a recipe's model: counts parameters on the meta device and traces a micro-batch under fake tensors.

survey = look(recipe.model, precision="bf16", device="cuda")
survey.training.peak(rows=32)                  # bytes of activations of a micro-batch of 32 pairs
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.core.types import Preprocess, UserError
from trainer.engine.precision import DTYPES, LossScale, autocast_forward, keep_float32
from trainer.models import ModelSettings, build
from trainer.models.adapt.lora import hold_base
from trainer.models.adapt.quantize import QUANTIZED
from trainer.optim import Shapes, trained_shapes
from trainer.plan.device import Device, Parking, as_on
from trainer.plan.model_shapes import lookup, stand_in
from trainer.plan.repeated_layers import Shortened
from trainer.plan.trace import Floats, Recorder, Trace

SIZES = (2, 4)  # rows of the two traces; a single row would meet kernels' special cases


@dataclass(frozen=True)
class Line:
    """values(rows) = start + slope * rows, for every operator of a pass."""

    start: Floats
    slope: Floats

    @staticmethod
    def through(small: Floats, large: Floats) -> Line:
        slope = (large - small) / (SIZES[1] - SIZES[0])
        return Line(small - slope * SIZES[0], slope)

    def at(self, rows: int) -> Floats:
        return self.start + self.slope * rows


@dataclass(frozen=True)
class Curve:
    """A pass as a function of the rows in a micro-batch."""

    live: Line
    gradients: Floats
    """Bytes of finished gradients after each operator; they do not depend on the rows."""
    flops: Line
    flops32: Line
    traffic: Line
    host: Line
    turn: int

    @staticmethod
    def through(small: Trace, large: Trace) -> Curve:
        assert len(small.live) == len(large.live), "the same operators whatever the rows"
        names = ("live", "flops", "flops32", "traffic", "host")
        lines = {name: Line.through(getattr(small, name), getattr(large, name)) for name in names}
        return Curve(gradients=small.gradients, turn=small.turn, **lines)

    def peak(self, rows: int, gradients: bool = False) -> float:
        """Most bytes alive at once; ``gradients`` counts those of parameters as they appear (the first micro-batch of a
        step)."""
        return float(np.max(self.live.at(rows) + (self.gradients if gradients else 0.0)))

    def forward_peak(self, rows: int) -> float:
        """Most bytes alive at once before the turn."""
        return float(np.max(self.live.at(rows)[: self.turn]))

    def saved(self, rows: int) -> float:
        """Bytes that wait for the backward pass."""
        return float(self.live.at(rows)[self.turn - 1])

    def host_bytes(self, rows: int) -> float:
        """Bytes of activations parked in host memory."""
        return float(self.host.at(rows)[-1])

    def seconds(self, rows: int, flops_per_second: float, flops32_per_second: float, bytes_per_second: float) -> float:
        """Roofline: every operator takes as long as its arithmetic (at the second rate where it multiplies float32
        numbers) or its traffic, whichever is longer."""
        in_float32 = self.flops32.at(rows)
        arithmetic = (self.flops.at(rows) - in_float32) / flops_per_second + in_float32 / flops32_per_second
        return float(np.maximum(arithmetic, self.traffic.at(rows) / bytes_per_second).sum())


@dataclass(frozen=True)
class Survey:
    """All that planning needs to know of a model; sizes in bytes, trainable ones in float32."""

    count: int
    """Parameters, in elements."""
    parameters: int
    trainable: int
    largest: int
    """The largest trainable parameter."""
    small: dict[int, int]
    """Trainable parameters up to a number of elements: elements -> bytes of all parameters of that size."""
    buffers: int
    embed_dim: int
    image_bytes: int
    """What the loader gives of one image: uint8 pixels, or its stored embedding."""
    token_bytes: int
    """And of its caption: tokens and their mask, or its stored embedding."""
    towers_trained: tuple[bool, bool]
    training: Curve
    """Forward with gradient, and backward."""
    inference: Curve
    """Forward without gradient: pass 1."""
    shapes: Shapes
    """Of the trained parameters: what the optimizer's moments take."""
    device: Device
    note: str = ""
    """Where the shapes come from when not from the recipe's own model."""


def look(
    settings: ModelSettings,
    precision: str,
    device: Device,
    inference: Curve | None = None,
    held: bool = False,
    float32_modules: tuple[str, ...] = (),
) -> Survey:
    """Builds the model without weights and traces it; ``device`` says whose autocast and whose memory is meant.

    ``inference`` saves a trace where it is known already: recomputation does not change it. ``held`` keeps locked
    weights as a teacher does: in what is computed in. ``float32_modules`` are those of ``engine.float32_modules``.
    """
    settings = _as_held(settings, precision)
    with _readable(settings) as (readable, note), torch.device("meta"):
        model = build(readable, weights=False)
    if held and precision != "fp32":
        hold_base(model.towers, DTYPES[precision])
    if precision != "fp32":
        keep_float32(model, float32_modules, "cpu")
    model.train()
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise UserError(
            "model: every parameter is locked, there is nothing to train; unlock a tower, or the scale and bias"
        )
    census: dict[str, Any] = {
        "count": sum(p.numel() for p in parameters),
        "parameters": sum(p.nbytes for p in parameters),
        "trainable": 4 * sum(p.numel() for p in trainable),
        "largest": 4 * max(p.numel() for p in trainable),
        "small": {
            n: sum(p.nbytes for p in parameters if p.numel() == n) for n in sorted({p.numel() for p in parameters})
        },
        "buffers": sum(b.nbytes for b in model.buffers()),
        "embed_dim": model.embed_dim,
        "image_bytes": _image_inputs(1, model.preprocess).nbytes,
        "token_bytes": _text_inputs(1, model.preprocess).nbytes + model.preprocess.num_tokens,
        "towers_trained": (model.trains("image"), model.trains("text")),
        "shapes": trained_shapes(model),
        "device": device,
    }
    periods = [
        layers if isinstance(layers, int) else 1 for layers in (settings.recompute.image, settings.recompute.text)
    ]
    shortened = Shortened(model, math.lcm(*periods))
    with FakeTensorMode(allow_non_fake_inputs=True), as_on(device) as parking:
        fake: Any = model.to_empty(device="cpu")
        if precision != "fp32":
            autocast_forward(fake, DTYPES[precision], LossScale() if precision == "fp16" else None, "cpu")
        training = Curve.through(*(_trace(fake, shortened, rows, census["towers_trained"], parking) for rows in SIZES))
        inference = inference or Curve.through(*(_trace(fake, shortened, rows, None, parking) for rows in SIZES))
    return Survey(**census, training=training, inference=inference, note=note)


def _as_held(settings: ModelSettings, precision: str) -> ModelSettings:
    """``settings`` with the base as this precision's training holds it; an upper bound for one in few bits."""
    if settings.lora is None:
        return settings
    computed = str(DTYPES[precision]).removeprefix("torch.")
    if settings.lora.base in QUANTIZED:
        return settings.model_copy(update={"lora": settings.lora.model_copy(update={"base": computed})})
    if settings.lora.base not in ("float32", computed):
        raise UserError(
            f"model.lora.base {settings.lora.base} is for cards that compute in it, and this one computes in "
            f"{precision}: {'leave it out' if precision == 'fp32' else f'take {computed}, or leave it out'}"
        )
    return settings


@contextlib.contextmanager
def _readable(settings: ModelSettings) -> Iterator[tuple[ModelSettings, str]]:
    """Settings that ``build`` can follow without the network, and what was assumed."""
    name = settings.path
    if name is None or os.path.isdir(name) or _cached(name):
        yield settings, ""
        return
    config = lookup(name)
    if config is None:
        try:  # not known here: the hub may answer
            with torch.device("meta"):
                build(settings, weights=False)
        except UserError as error:
            raise UserError(
                f"{error}; the planner's own table has no such model either, give a local directory"
            ) from error
        yield settings, ""
        return
    with stand_in(settings, config) as local:
        yield local, f"{name}: shapes from the planner's built-in table"


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    )


def _image_inputs(rows: int, preprocess: Preprocess) -> Tensor:
    precomputed = preprocess.precomputed
    if precomputed is not None and precomputed.side == "image":
        return torch.zeros(rows, precomputed.width, dtype=torch.float16)
    return torch.zeros(rows, 3, *preprocess.image_size, dtype=torch.uint8)


def _text_inputs(rows: int, preprocess: Preprocess) -> Tensor:
    precomputed = preprocess.precomputed
    if precomputed is not None and precomputed.side == "text":
        return torch.zeros(rows, precomputed.width, dtype=torch.float16)
    return torch.zeros(rows, preprocess.num_tokens, dtype=torch.int64)


def _trace(model: Any, shortened: Shortened, rows: int, trained: tuple[bool, bool] | None, parking: Parking) -> Trace:
    """One micro-batch; ``trained`` None stops after the forward pass, without gradient."""
    pixels, tokens = _image_inputs(rows, model.preprocess), _text_inputs(rows, model.preprocess)
    image, text = trained if trained is not None and any(trained) else (True, True)
    recorder = parking.recorder = shortened.recorder = Recorder(model.parameters())
    with recorder, torch.set_grad_enabled(trained is not None):
        z = model(pixels if image else None, tokens if text else None)
        if trained is not None:
            leaf = [torch.zeros_like(part) for part in z[:4]]
            terms = [
                torch.sum(part * gradient) for part, gradient in zip(z[:4], leaf, strict=True) if part.requires_grad
            ]
            total = torch.stack(terms).sum()
            recorder.turn()
            del z, terms
            total.backward()
            del total
    model.zero_grad()
    return shortened.restore(recorder.trace())
