"""Workarounds for DeepSpeed 0.19: what importing it must not do, norms taken parameter by parameter, and what it does
not reset after an error."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor

from trainer.core import distributed

# To find out which of its C++ extensions can be built, DeepSpeed runs the compiler in every process; on CPUs it would
# also spend a minute on building one for small all-reduces. RingLIP needs no extension.
vars(deepspeed.ops).setdefault("__compatible_ops__", {})
# DeepSpeed calls collectives by names that torch has deprecated, and torch warns on every rank, at ZeRO-3 in every
# step. Users cannot do anything about it. The warning comes from torch's logger; nothing in this package uses those
# names.
warnings.filterwarnings(
    "ignore",
    r"`torch\.distributed\.(all_gather_into_tensor|_all_gather_base|reduce_scatter_tensor|_reduce_scatter_base)` is ",
    FutureWarning,
    r"torch\.distributed\.c10d_logger",
)
DEEPSPEED_LOGGER = logging.getLogger("DeepSpeed")
DEEPSPEED_LOGGER.setLevel(logging.WARNING)  # DeepSpeed's start-up report is a hundred lines per rank
# It calls other optimizers than its own and torch's untested; tests/test_engine_optimizers.py tests trainer.optim's.
DEEPSPEED_LOGGER.addFilter(lambda record: "untested optimizer" not in record.getMessage())


def use_all_cores() -> None:
    """Overrides torchrun's OMP_NUM_THREADS=1, with which an offloaded optimizer would run on one core; a number that
    the user set stays."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(distributed.cores())


def norm_of_all_at_once(ds_engine: Any) -> None:
    """Makes ZeRO 1 to 3 take the norm of their gradients in a few kernels, and ZeRO-0 leave clipping to its caller.

    DeepSpeed takes it of one parameter after the other, at ZeRO-0 in a step that has been clipped already: thousands of
    small kernels, a tenth of a ViT-B/16 step on an H100.
    """
    ds_engine._config.gradient_clipping = 0.0
    optimizer = ds_engine.optimizer
    if not hasattr(optimizer, "get_grad_norm_direct"):
        return
    partitions = getattr(optimizer, "_get_param_partition_group", None)  # ZeRO-3's

    def norm(gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        parts = torch._foreach_norm([g for g in gradients if not getattr(g, "_zero_padding", False)])
        squares = torch.stack(parts).double().square_().sum() if parts else torch.zeros(()).double()
        squares = squares.to(optimizer.device)
        dist.all_reduce(squares, group=partitions(params[0]) if partitions else optimizer.dp_process_group)
        total = squares.sqrt_().float()
        return torch.where(total.isfinite(), total, -1.0)  # what DeepSpeed says of a norm that is not finite

    optimizer.get_grad_norm_direct = norm


@contextmanager
def known_norm(optimizer: Any, norm: Any) -> Iterator[None]:
    """Within, a ZeRO optimizer clips by ``norm``, what it found before, instead of taking it again: one number, at
    ZeRO-3 one for each group of parameters."""
    name = "_get_norm_groups" if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) else "scaled_global_norm"
    setattr(optimizer, name, lambda *args, **kwargs: norm)
    try:
        yield
    finally:
        delattr(optimizer, name)


def forget_reductions(optimizer: Any) -> None:
    """Resets ZeRO's bookkeeping of a backward pass to the start of a step, after an error at any point.

    DeepSpeed resets it only at the end of a completed step: gradients that an interrupted step leaves in the buckets
    would be reduced again by the next, and no parameter may be reduced twice.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # reductions on other streams may still read the buckets that are released here
    optimizer._backward_active_depth = optimizer._remaining_grad_acc_hooks = 0
    optimizer._backward_hook_state.reset_for_new_step()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        optimizer.params_already_reduced = dict.fromkeys(optimizer.params_already_reduced, False)
        optimizer._offload_boundary_param_ids = set()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        return
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.extra_large_param_to_reduce.clear()
    optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
    optimizer._clear_previous_reduced_grads()
    optimizer._release_ipg_buffers()
    optimizer._release_preflattened_grad_buffers()
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
    for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        gradients.update(dict.fromkeys(gradients))  # in place: each parameter refers to the first as well
