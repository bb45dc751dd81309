"""A model under DeepSpeed, reduced to the calls of a training step.

    engine = build_engine(model, build_optimizer(model, recipe.optim), recipe.engine, clip=recipe.optim.clip)
    z = engine.forward(pixels, tokens, token_mask)

Several backward passes make one optimizer step, alike at every ZeRO stage:

    engine.start_gradients()
    engine.backward(surrogate)                 # any number of times
    norm = engine.finish_gradients()           # averages over ranks
    engine.step()                              # or engine.discard_gradients()

Gradients stay on each rank until ``finish_gradients`` reduces them once (least traffic), unless
``start_gradients(each=True)`` requests a reduction in every backward: then a rank at ZeRO 2 and 3 never holds more than
its shard (least memory). Otherwise nothing communicates between start and finish except ZeRO-3's parameter fetches, so
a rank that runs out of memory there can still tell the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from pydantic import ValidationError
from torch import Tensor, nn

from trainer.core import collectives, distributed
from trainer.core.partitioned import PartitionedOptimizer
from trainer.core.types import Embeddings, UserError
from trainer.engine.compiled import compile_layers
from trainer.engine.ds_config import BUCKET_ELEMENTS, EngineSettings, complete, load, reduces_early
from trainer.engine.ema import average_weights, averaged
from trainer.engine.fragments import Fragment, fragments
from trainer.engine.motion import Motion
from trainer.engine.precision import (
    DTYPES,
    LossScale,
    autocast_forward,
    find_overflow,
    keep_float32,
    require_float32,
)
from trainer.engine.state_names import WEIGHT
from trainer.engine.workarounds import forget_reductions, known_norm, norm_of_all_at_once, use_all_cores

logger = logging.getLogger(__name__)


class Engine:
    """DeepSpeed's engine behind the calls that a step makes. All ranks must make the same calls in the same order."""

    def __init__(self, ds_engine: Any, merged_config: dict[str, Any], loss_scale: LossScale | None = None) -> None:
        self.ds_engine = ds_engine
        self.loss_scale = loss_scale
        """Only in fp16."""
        self.merged_config = merged_config
        """The configuration passed to DeepSpeed, for ``<run>/deepspeed.json``."""
        self.device = distributed.device()
        self.zero_stage = int(merged_config["zero_optimization"]["stage"])
        self.towers_trained: tuple[bool, bool] | None = None
        """Whether (image, text) embeddings depend on a trainable parameter; determined by the first step that needs
        it."""
        self._clip = float(merged_config["gradient_clipping"])
        self._accumulation: AbstractContextManager[None] | None = None
        self._each = False
        self._scale: list[Fragment] | None = None
        self._motion: Motion | None = None
        self._known_norm: Any = torch.zeros(())
        """Of the gradients that ``finish_gradients`` made, as DeepSpeed found it; ``step`` clips by it."""

    @property
    def module(self) -> Any:
        """The model itself. At ZeRO-3 its parameters are empty outside ``forward``."""
        return self.ds_engine.module

    @property
    def forward_communicates(self) -> bool:
        """Whether ``forward`` contains collectives (ZeRO-3 fetches parameters), so that no rank can leave it alone."""
        return self.zero_stage == 3 and distributed.world_size() > 1

    @property
    def backward_communicates(self) -> bool:
        """The same for ``backward`` between ``start_gradients`` and ``finish_gradients``."""
        return self.forward_communicates or (self._reduces_in_backward and distributed.world_size() > 1)

    @property
    def _reduces_in_backward(self) -> bool:
        return self._each and self.zero_stage >= 2  # ZeRO 0 and 1 keep whole gradients anyway

    @property
    def reduces_early(self) -> bool:
        """Whether ``start_gradients(each=True)`` saves memory on this engine."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters() if p.requires_grad)
        return reduces_early(self.merged_config["zero_optimization"], 4.0 * trained, distributed.world_size())

    def forward(self, pixels: Tensor | None, tokens: Tensor | None, token_mask: Tensor | None) -> Embeddings:
        """Runs the model; a tower whose input is None is skipped."""
        return self.ds_engine(pixels, tokens, token_mask)

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next step, times the ``rate`` of parameter groups that have one."""
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)

    def cap_scale(self, largest: float) -> None:
        """Caps the scale t = exp(logit_scale) at ``largest``, in every copy on this rank."""
        if self._scale is None:
            self._scale = [
                fragment for fragment in fragments(self.ds_engine) if fragment.name.rsplit(".", 1)[-1] == "logit_scale"
            ]
        for fragment in self._scale:
            holders = [fragment.read(WEIGHT), fragment.parameter.detach()]
            if hasattr(fragment.parameter, "ds_tensor"):
                holders.append(fragment.parameter.ds_tensor.detach())
            for holder in holders:
                holder.clamp_(max=math.log(largest))

    def motion(self, part_of: Callable[[str], str | None]) -> Motion:
        """Measures how far a step moves the weights of each part, which ``part_of(parameter name)`` names; one for
        the whole run."""
        if self._motion is None:
            self._motion = Motion(self.ds_engine, part_of)
        return self._motion

    def average_weights(self, decay: float) -> None:
        """Updates the running average of the weights (``OptimSettings.ema``); 0 drops it."""
        average_weights(self.ds_engine, decay)

    def averaged(self) -> AbstractContextManager[bool]:
        """Within the block, ``forward`` uses the average; yields whether there is one yet. Call it on all ranks."""
        return averaged(self.ds_engine)

    def lower_loss_scale(self) -> bool:
        """Halves fp16's loss scale after an overflow; returns whether it did, and the step can be repeated."""
        if self.loss_scale is None or not self.loss_scale.lower():
            return False
        logger.info(f"fp16 overflow: repeating the step at half the loss scale, {self.loss_scale.value:g}")
        return True

    def find_overflow(self) -> AbstractContextManager[list[str]]:
        """Within the block, collects the names of modules whose outputs overflow float16 in ``forward``."""
        return find_overflow(self.module)

    def start_gradients(self, each: bool = False) -> None:
        """Starts the backward passes of a step; ``each`` reduces gradients in every one of them (ZeRO 2 and 3)."""
        assert self._accumulation is None, "the last step's gradients were neither used nor discarded"
        self._each = each
        if self.zero_stage and not self._reduces_in_backward:
            self._accumulation = self.ds_engine.coalesce_grad_reduction()
            self._accumulation.__enter__()
        self._zero_gradient_partitions()
        self.ds_engine.set_gradient_accumulation_boundary(False)

    def backward(self, scalar: Tensor, last: bool = False) -> None:
        """Adds the gradient of ``scalar``. With ``each``, mark the ``last`` call."""
        if self._reduces_in_backward and last:
            self.ds_engine.set_gradient_accumulation_boundary(True)
        self.ds_engine.backward(scalar, scale_wrt_gas=False)

    def finish_gradients(self) -> float:
        """Averages gradients over ranks; returns the norm of the global gradient before clipping (inf if not
        finite)."""
        if self._reduces_in_backward:
            return self._norm()
        self.ds_engine.set_gradient_accumulation_boundary(True)
        if self._accumulation is None:
            if distributed.world_size() > 1:  # DeepSpeed would copy all gradients into a bucket for nothing
                self.ds_engine.allreduce_gradients(bucket_size=BUCKET_ELEMENTS)
        else:
            accumulation, self._accumulation = self._accumulation, None
            accumulation.__exit__(None, None, None)
        return self._norm()

    def step(self, clip: float | None = None) -> None:
        """Updates the weights with the gradients of ``finish_gradients`` and clears these.

        ``clip`` lowers the recipe's limit on the gradient norm for this step (it never raises it).
        """
        optimizer = self.ds_engine.optimizer
        limit = min((value for value in (self._clip, clip or 0.0) if value > 0), default=0.0)
        self.ds_engine.set_gradient_accumulation_boundary(True)
        if isinstance(optimizer, ZeROOptimizer):
            optimizer.clip_grad = limit
            with known_norm(optimizer, self._known_norm):
                self.ds_engine.step()
        else:
            if limit:
                torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), limit, self._known_norm)
            self.ds_engine.step()

    def discard_gradients(self) -> None:
        """Drops the accumulated gradients, reduced or not, as if ``start_gradients`` had not been called. Call it on
        all ranks."""
        optimizer = self.ds_engine.optimizer
        self.ds_engine.zero_grad()
        if self._accumulation is not None:
            # Leaving DeepSpeed's context reduces the gradients: there are none left, so no rank waits for another.
            accumulation, self._accumulation = self._accumulation, None
            accumulation.__exit__(None, None, None)
        self.ds_engine.set_gradient_accumulation_boundary(False)
        if isinstance(optimizer, ZeROOptimizer):
            optimizer.zero_grad(set_to_none=True)
            forget_reductions(optimizer)

    def close(self) -> None:
        """Releases the memory of a finished engine; nothing else may be called after it.

        Its hooks on gradients hold DeepSpeed's ZeRO optimizers, and with them weights and moments, beyond the reach of
        Python's garbage collector: a second engine in this process would find the memory of the first one taken. At
        ZeRO-3 DeepSpeed holds more, which only the end of the process releases.
        """
        self.ds_engine.destroy()

    def _norm(self) -> float:
        optimizer = self.ds_engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._known_norm = optimizer._get_norm_groups()
            groups = [float(norm) for norm in self._known_norm]
            norm = -1.0 if min(groups) < 0 else sum(value**2 for value in groups) ** 0.5
        elif isinstance(optimizer, ZeROOptimizer):
            self._known_norm = optimizer.scaled_global_norm()
            norm = float(self._known_norm)
        else:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._known_norm = torch.nn.utils.get_total_norm(gradients)
            norm = float(self._known_norm)
        norm = norm if 0 <= norm < float("inf") else float("inf")  # DeepSpeed says -1 where the norm is not finite
        return collectives.mean_over_ranks([norm])[0]  # ranks must decide on identical bits

    def _zero_gradient_partitions(self) -> None:
        """Clears the buffers that ZeRO keeps between steps: a parameter that a step does not use would otherwise get
        its previous gradient."""
        optimizer = self.ds_engine.optimizer
        kept: list[Tensor] = []
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            kept += optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()
            if optimizer.offload_optimizer:
                kept += [group.grad for group in optimizer.fp32_partitioned_groups_flat if group.grad is not None]
        elif isinstance(optimizer, ZeROOptimizer) and optimizer.cpu_offload:
            kept += [group.grad for group in optimizer.single_partition_of_fp32_groups if group.grad is not None]
        for buffer in kept:
            buffer.zero_()


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings, clip: float = 0.0
) -> Engine:
    """Wraps ``model`` with DeepSpeed on this rank's device, with rank 0's weights on all ranks.

    ``optimizer`` is a torch optimizer over the model's trainable parameters (``trainer.optim.build_optimizer``);
    ``clip`` is the largest norm of the global gradient (0: no limit). Raises UserError for a ds_config that sets what
    the recipe owns.
    """
    config = complete(load(settings.ds_config_on(distributed.world_size())), clip)
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    assert not scalars, f"DeepSpeed cannot hold 0-dimensional parameters: {scalars}"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "model: every parameter is locked, so there is nothing to train; unlock a tower, or the scale and bias"
        )
    precision = settings.computes_in
    held = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if odd := held - {torch.float32, DTYPES[precision]}:
        name = str(odd.pop()).removeprefix("torch.")
        raise UserError(
            f"model.lora.base {name} is for towers that compute in it, and this run computes in {precision}: set "
            f"engine.precision, or leave model.lora.base out"
        )
    model = model.to(distributed.device())
    if config["zero_optimization"]["stage"] == 3 and not all(
        parameter.is_floating_point() for parameter in model.parameters()
    ):
        raise UserError(
            "model.lora.base int8 and nf4 cannot be partitioned: take an engine.ds_config of ZeRO 0 to 2, or bfloat16"
        )
    distributed.init()
    loss_scale = LossScale() if precision == "fp16" else None
    if precision == "fp32":
        require_float32()
    else:
        keep_float32(model, settings.float32_modules)
        autocast_forward(model, DTYPES[precision], loss_scale)
    if settings.compile:
        compile_layers(model, config["zero_optimization"]["stage"])
    model.train()
    if (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
        use_all_cores()
    try:
        ds_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"engine.ds_config {settings.ds_config}: DeepSpeed rejects {key!r} {first['input']!r}: {first['msg']}"
        ) from error
    norm_of_all_at_once(ds_engine)
    if isinstance(optimizer, PartitionedOptimizer):
        pieces = [piece for piece in fragments(ds_engine) if piece.optimizer is not None]
        optimizer.locate(pieces, partitioned=config["zero_optimization"]["stage"] > 0)
    return Engine(ds_engine, config, loss_scale)
