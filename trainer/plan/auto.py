"""``batch.micro_batch: auto``: the planner's answer for an unchanged recipe."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import psutil
import torch
import torch.distributed as dist

from trainer.config import Recipe
from trainer.core import distributed
from trainer.plan.device import Device
from trainer.plan.memory import Job
from trainer.plan.profile import Survey, look
from trainer.plan.search import largest, usable_bytes, zero_section

logger = logging.getLogger(__name__)


def job_of(recipe: Recipe, gpus: int, nodes: int) -> Job:
    """The work of ``gpus`` ranks in ``nodes`` in a step. Raises UserError if the global batch does not divide
    evenly."""
    rows = distributed.per_rank(recipe.batch.size, gpus)
    here, optim = max(1, gpus // nodes), recipe.optim
    given: dict[str, Any] = {"node_ranks": here, "optim": optim, "average": optim.ema > 0}
    return Job(gpus, rows, 1, recipe.batch.grad_reduction, recipe.loss, **given)


def teacher_of(recipe: Recipe, precision: str, device: Device = "cuda") -> Survey | None:
    """The survey of the teacher that the recipe runs; None if there is none."""
    if recipe.distill is None or recipe.distill.stored is not None:
        return None
    return look(recipe.distill.model, precision, device, held=True)


def largest_micro_batch(recipe: Recipe, memory_bytes: float, world: int, device: Device = "cuda") -> int:
    """The largest micro-batch that fits ``memory_bytes`` per rank.

    1 if not even that fits: the step will then fail with a message, or show that the forecast was too careful.
    """
    precision = recipe.engine.computes_in
    job = replace(job_of(recipe, world, 1), teacher=teacher_of(recipe, precision, device))
    survey = look(recipe.model, precision, device, float32_modules=recipe.engine.float32_modules)
    rows, _ = largest(survey, zero_section(recipe.engine.ds_config_on(world)), job, usable_bytes(memory_bytes))
    return max(1, rows)


def micro_batch(recipe: Recipe) -> int | None:
    """Rows per rank that the towers see at once; ``auto`` asks the planner. All ranks take the smallest answer: their
    cards may differ."""
    if recipe.batch.micro_batch != "auto":
        return recipe.batch.micro_batch
    device = distributed.device()
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = psutil.virtual_memory().available / (distributed.ranks_here() or distributed.world_size())
    rows = largest_micro_batch(recipe, memory, distributed.world_size(), "cuda" if device.type == "cuda" else "cpu")
    if distributed.world_size() > 1:
        smallest = torch.tensor([rows], device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        rows = int(smallest.item())
    rows = min(rows, recipe.batch.size // distributed.world_size())
    logger.info(f"batch.micro_batch auto: {rows} (by the planner, for {memory / 2**30:.1f} GiB per rank)")
    return rows
