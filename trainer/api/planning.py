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
    """Finds what fits: for every ds_config the largest micro-batch, its memory by parts and its time, and the best
    choice.

    For a recipe, recomputation and LoRA are considered too. A module is taken as it is, with AdamW in float32 and the
    two-pass step, partitioned as by DeepSpeed; DDP needs the memory of zero0, FSDP2 about that of zero3.

    Args:
        target: a recipe (file, name or sections), or a module whose forward takes ``inputs`` and returns embeddings.
        gpu_memory: of one card: "16GiB", "24GB".
        inputs: for a module: examples with a row for each pair; only shapes and dtypes count.
        batch_size: pairs of the global batch; for a recipe None keeps its own, for a module it is required.
        precision: for a module: bf16, fp16, fp32, or auto (what the card does best).
        reserve: left to the CUDA context, cuBLAS and NCCL.

    Returns:
        ``options`` (each with ``ds_config``, ``micro_batch``, ``peak.total`` in bytes, ``peak.parts``,
        ``step_seconds``), ``chosen`` (None where nothing fits), ``notes``.

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
