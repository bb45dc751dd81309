"""``ringlip.plan``: forecasts memory and time per GPU for a recipe or any module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.api.training import read_recipe
from trainer.core.distributed import per_rank
from trainer.core.types import UserError
from trainer.plan import command
from trainer.plan.command import Plan, amount
from trainer.plan.memory import Job
from trainer.plan.module import survey_module
from trainer.plan.roofline import default_card
from trainer.plan.search import Way, choose, options, usable_bytes


def plan(
    target: str | Path | Mapping[str, Any] | nn.Module,
    gpu_memory: str,
    gpus: int = 1,
    *,
    inputs: Sequence[Tensor] | None = None,
    batch_size: int | None = None,
    precision: str = "auto",
    reserve: str = "1GiB",
) -> Plan:
    """Finds what fits: for every ds_config the largest micro-batch, its memory (by parts) and its time per step; and
    the best choice among them.

    For a recipe, recomputation and LoRA are tried too. A module is planned unchanged, with float32 AdamW and the
    two-pass step, partitioned as DeepSpeed does it; DDP needs the memory of zero0, FSDP2 about that of zero3.

    Args:
        target: a recipe (file, name or sections), or a module whose forward takes ``inputs`` and returns embeddings.
        gpu_memory: memory of one GPU: "16GiB", "24GB".
        inputs: for a module: example inputs, one row per pair; only their shapes and dtypes matter.
        batch_size: pairs in the global batch; None: the recipe's own. Required for a module.
        precision: for a module: bf16, fp16, fp32, or auto (the fastest that the GPU supports).
        reserve: memory per GPU left to the CUDA context, cuBLAS and NCCL.

    Returns:
        ``options`` (each with ``ds_config``, ``micro_batch``, ``peak.total`` in bytes, ``peak.parts``,
        ``step_seconds``), ``chosen`` (None if nothing fits), ``notes``.

    Raises:
        UserError: the batch does not divide among the GPUs, or the module cannot be traced.
    """
    memory, kept = amount(gpu_memory), amount(reserve)
    if not isinstance(target, nn.Module):
        recipe = read_recipe(target, {} if batch_size is None else {"batch.size": batch_size})
        return command.plan(recipe, memory, gpus, reserve=kept)
    if batch_size is None:
        raise UserError("plan: a module needs batch_size, the pairs of the global batch")
    card = default_card(memory)
    chosen = card.precision(precision)
    job = Job(gpus, per_rank(batch_size, gpus), 1, node_ranks=gpus)
    survey = survey_module(target, inputs or (), chosen)
    budget = usable_bytes(memory, kept)
    found = options([Way("as it is", (), survey, True)], job, budget, card, chosen, card.link)
    return Plan(found, choose(found), budget, [survey.note], job)
