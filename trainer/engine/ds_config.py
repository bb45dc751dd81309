"""Reads a DeepSpeed configuration, checks it and completes it from the recipe. It decides where tensors live, never
what is computed.

    engine:
      ds_config: zero2          # ds_configs/zero2.json; or the path of a JSON file of your own

DeepSpeed ignores unknown keys and accepts several that silently change gradients. Here every key is either known to
keep training exact, or refused with one line that says where to set it or what it would do.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from trainer.core.settings import OPERATIONAL, Settings
from trainer.core.shipped import shipped
from trainer.core.types import UserError
from trainer.engine.precision import Precision, best_precision

FOLDER = shipped("ds_configs")


class EngineSettings(Settings):
    """How DeepSpeed holds the model."""

    ds_config: Annotated[str, OPERATIONAL] = "auto"
    """A file in ds_configs/ (zero0, zero1, zero2, zero3, zero2_offload, ...) or the path of a JSON file; decides where
    tensors live. auto: zero0 on one rank, where there is nothing to partition, else zero1."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 and fp16 run the towers under torch autocast; weights, gradients, optimizer and loss stay float32. fp16
    scales the loss dynamically: a step whose gradient overflows is repeated at half the scale, so no batch is lost.
    auto: bf16 on processors with bf16 matrix units, fp16 on older GPUs (V100, T4, RTX 20xx, GTX 16xx), else fp32, which
    is faster there. All ranks of a run need the same kind of device."""
    float32_modules: tuple[str, ...] = ()
    """Regular expressions: modules with a matching name compute in float32. For layers that overflow in fp16; a warning
    names them."""
    compile: Annotated[bool, OPERATIONAL] = False
    """The layers of the towers go through torch.compile (ZeRO 0 to 2), some seconds to a minute at the start of a run,
    of an evaluation and of a new micro-batch. Results differ by rounding. Measured: 1.3x to 1.4x on an H100, 1.00x to
    1.06x on CPUs."""

    def ds_config_on(self, ranks: int) -> str:
        """The ds_config, with `auto` decided."""
        if self.ds_config != "auto":
            return self.ds_config
        return "zero0" if ranks == 1 else "zero1"

    @property
    def computes_in(self) -> Precision:
        """The precision of the towers on this machine."""
        return best_precision() if self.precision == "auto" else self.precision


OWNERS = {
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.micro_batch (the step is exact for any number of micro-batches)",
    "managed_gradient_accumulation": "batch.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup and optim.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "communication_data_type": "engine.precision (gradients are averaged in float32)",
    "gradient_accumulation_dtype": "engine.precision",
    "activation_checkpointing": "model.recompute",
    "seed": "run.seed",
    "checkpoint": "checkpoint",
    "tensorboard": "log",
    "wandb": "log",
    "csv_monitor": "log",
    "comet": "log",
}
"""Top-level keys that the recipe sets."""

REFUSED = {
    "prescale_gradients": "ZeRO-3 then silently halves gradients",
    "gradient_predivide_factor": "ZeRO-3 then silently scales gradients",
    "gradient_allreduce_op": "a sum over ranks is not the gradient of the global batch; RingLIP averages",
    "sparse_gradients": "it changes how embeddings are averaged and is untested with the two-pass step",
    "elasticity": "DeepSpeed has removed elastic training; a RingLIP checkpoint resumes on any number of ranks",
    "zero_force_ds_cpu_optimizer": "RingLIP steps with the recipe's own optimizer, for equal weights everywhere",
    "zero_allow_untested_optimizer": "RingLIP sets it",
    "zero_optimization.round_robin_gradients": "it reorders gradients and is not exact with gradient inspection",
    "zero_optimization.compute_grad_norm": "optim.clip and the guard against spikes need the norm of the gradient",
    "zero_optimization.zero_quantized_gradients": "quantised gradients are not exact",
    "zero_optimization.zero_quantized_weights": "quantised weights are not exact",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantised weights are not exact",
    "zero_optimization.zenflow": "it applies gradients late: another objective than the recipe's",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.elastic_checkpoint": "a RingLIP checkpoint resumes on any number of ranks without it",
}
"""Keys that would change the result, with the reason."""

NVME = {
    "offload_optimizer": "DeepSpeed 0.19 then trains other weights (2e-3 off after a step, on tensors that it swaps)",
    "offload_param": "weights on NVMe are exact but cannot be put back from a checkpoint",
}

KNOWN = {
    "": [
        "zero_optimization",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
        "steps_per_print",
    ],
    "zero_optimization": [
        "stage",
        "offload_optimizer",
        "offload_param",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "sub_group_size",
        "parameter_alignment",
        "memory_efficient_linear",
        "log_trace_cache_warnings",
        "ignore_unused_parameters",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
    ],
    "zero_optimization.offload_optimizer": ["device", "pin_memory", "buffer_count"],
    "zero_optimization.offload_param": ["device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"],
}
"""Keys that a ds_config may set: stage, offload, buckets, overlap, and what DeepSpeed measures and prints."""


SECTIONS = [*KNOWN, "comms_logger", "flops_profiler"]

BUCKET_ELEMENTS = 20_000_000
"""Default bucket size in elements (80 MB). DeepSpeed's default is 25 times that, all of which it allocates."""

BUCKETS = {
    0: [],
    1: ["reduce_bucket_size", "allgather_bucket_size"],
    2: ["reduce_bucket_size", "allgather_bucket_size"],
    3: ["reduce_bucket_size", "stage3_prefetch_bucket_size"],
}


def load(name: str) -> dict[str, Any]:
    """The checked ds_config ``name`` in ds_configs/, or at that path. Raises UserError that names the wrong key and
    where to set it."""
    path = FOLDER / f"{name}.json" if "/" not in name and not name.endswith(".json") else Path(name).expanduser()
    if not path.is_file():
        names = sorted(file.stem for file in FOLDER.glob("*.json"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = (
            f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}, or give the path of a JSON file"
        )
        raise UserError(f"engine.ds_config: no {path}; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: a ds_config is a JSON object, but this file is a {type(config).__name__}")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3 (got {zero!r})")
    _check_offload(path, zero)
    _check_keys(path, config, "")
    return config


def _check_keys(path: Path, section: dict[str, Any], where: str) -> None:
    for key, value in section.items():
        dotted = f"{where}.{key}" if where else key
        if dotted in OWNERS:
            raise UserError(f"{path}: {dotted!r} belongs to the recipe: remove it here and set {OWNERS[dotted]} there")
        if dotted in REFUSED:
            raise UserError(f"{path}: {dotted!r} is refused: {REFUSED[dotted]}; remove it")
        if key not in KNOWN[where]:
            close = difflib.get_close_matches(key, KNOWN[where], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"a ds_config may set {', '.join(KNOWN[where])}"
            raise UserError(f"{path}: unknown key {dotted!r}; {hint}")
        if dotted in SECTIONS:
            if not isinstance(value, dict | None):
                raise UserError(f"{path}: {dotted!r} is {value!r}, but it is a section: an object of keys")
            if dotted in KNOWN:
                _check_keys(path, value or {}, dotted)
        elif key != "device" and value is not None and not (isinstance(value, int | float) and value >= 0):
            raise UserError(f"{path}: {dotted!r} is {value!r}: it must be a number of 0 or more, true or false")


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    stage = zero.get("stage", 0)
    for kind, least in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(kind)
        if offload is None:
            continue
        if not isinstance(offload, dict) or offload.get("device", "none") not in ("none", "cpu", "nvme"):
            raise UserError(f"{path}: zero_optimization.{kind}.device must be 'cpu' or 'none' (got {offload!r})")
        if offload.get("device") == "nvme":
            raise UserError(f"{path}: zero_optimization.{kind}.device 'nvme' is refused: {NVME[kind]}; use 'cpu'")
        if offload.get("device", "none") != "none" and stage < least:
            raise UserError(
                f"{path}: zero_optimization.{kind} needs zero_optimization.stage >= {least}, this file has {stage}"
            )


def reduces_early(zero: dict[str, Any], trained_bytes: float, ranks: int) -> bool:
    """Resolves ``batch.grad_reduction: auto``: whether every backward pass reduces gradients (no rank ever has all of
    them), or each step once (every rank holds all ``trained_bytes`` of them until then).

    At ZeRO-3 every pass fetches the weights anyway, and on one rank the only traffic is to the host of an offloaded
    optimizer. ZeRO-2 on several ranks would send the gradients once per micro-batch: only on request.
    """
    bucket = 4.0 * zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    if zero.get("stage") == 3:
        return trained_bytes <= bucket or trained_bytes > 2 * bucket
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return zero.get("stage") == 2 and offloads and ranks == 1 and trained_bytes > 2 * bucket


def complete(config: dict[str, Any], clip: float) -> dict[str, Any]:
    """The ds_config with the recipe's values filled in, as passed to DeepSpeed and written to ``<run>/deepspeed.json``.

    Batch sizes are 1: RingLIP drives micro-batches itself. ``clip`` is set even if 0, because DeepSpeed's default is
    1.0.
    """
    zero = dict(config.get("zero_optimization", {}))
    zero.setdefault("stage", 0)
    for bucket in BUCKETS[zero["stage"]]:
        zero.setdefault(bucket, BUCKET_ELEMENTS)
    return {
        "steps_per_print": 1_000_000_000,
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(clip),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
