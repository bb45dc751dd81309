"""Forecasts the time of a step: a roofline over the traced operators, and a model of the links. The planner prints its
assumptions.

Every operator takes max(FLOPs / attained FLOP/s, bytes / attained bandwidth), attained being MATRIX and STREAM of the
datasheet's dense figures, for the dtype that the operator multiplies. That is a step with ``engine.compile`` (measured
on an H100: 1.02 to 1.08 times the forecast of ViT-B/16); without it kernels are smaller and it takes 1.4 times as long.
Collectives run at the slowest link on their ring
and overlap with nothing: a step in practice is somewhat faster where DeepSpeed overlaps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.plan.memory import Job
from trainer.plan.profile import Survey

MATRIX, STREAM = 0.6, 0.8
HOST_BYTES = 40e9  # a CPU's optimizer step, bytes a second
BUS_BYTES = 20e9  # between host and device


@dataclass(frozen=True)
class Card:
    """Dense datasheet figures: FLOP/s of products of 16-bit numbers summed in float32 (as cuBLAS does) and of float32
    numbers, bytes a second of memory and to the next card."""

    name: str
    half: float
    single: float
    memory: float
    link: float
    bf16: bool = True
    """Whether the 16-bit numbers may be bf16; otherwise they are fp16 and bf16 is computed as fp32."""

    def precision(self, wanted: str) -> str:
        """What ``engine.precision`` comes to on this card."""
        return ("bf16" if self.bf16 else "fp16") if wanted == "auto" else wanted

    def attained(self, precision: str) -> float:
        """FLOP/s of matrix products."""
        return MATRIX * (self.half if precision == "fp16" or (precision == "bf16" and self.bf16) else self.single)


CARDS = {
    card.name: card
    for card in (
        Card("gtx1660ti", 5.4e12, 5.4e12, 288e9, 10e9, bf16=False),  # no tensor cores
        Card(
            "rtx2080ti", 53.8e12, 13.4e12, 616e9, 10e9, bf16=False
        ),  # twice that with float16 sums, which are not used
        Card("titanrtx", 130.5e12, 16.3e12, 672e9, 10e9, bf16=False),
        Card("t4", 65e12, 8.1e12, 320e9, 10e9, bf16=False),
        Card("v100", 125e12, 15.7e12, 900e9, 120e9, bf16=False),
        Card("rtx3090", 71e12, 35.6e12, 936e9, 20e9),
        Card("rtx4090", 165e12, 82.6e12, 1008e9, 20e9),
        Card("rtx5090", 210e12, 105e12, 1792e9, 40e9),
        Card("l4", 121e12, 30.3e12, 300e9, 20e9),
        Card("a10", 125e12, 31.2e12, 600e9, 20e9),
        Card("l40s", 362e12, 91.6e12, 864e9, 20e9),
        Card("a100", 312e12, 19.5e12, 2039e9, 250e9),
        Card("h100", 989e12, 67e12, 3350e9, 400e9),
        Card("h200", 989e12, 67e12, 4800e9, 400e9),
        Card("b200", 2250e12, 75e12, 8000e9, 800e9),
    )
}


def default_card(memory_bytes: float) -> Card:
    """A common card with about that much memory."""
    known = ((12, "rtx2080ti"), (15.5, "t4"), (17, "v100"))
    for limit, name in (*known, (25, "rtx4090"), (49, "l40s"), (81, "a100"), (142, "h200")):
        if memory_bytes <= limit * 2**30:
            return CARDS[name]
    return CARDS["b200"]


def step_seconds(
    survey: Survey, zero: dict[str, Any], job: Job, card: Card, precision: str, link: float, tflops: float | None = None
) -> dict[str, float]:
    """Seconds of one step by what they are spent on. ``link`` is bytes a second on the slowest hop of a ring over all
    ranks; ``tflops`` replaces the attained matrix rate.
    """
    matrix = tflops * 1e12 if tflops else card.attained(precision)
    matrix32 = matrix if precision == "fp32" else card.attained("fp32")
    stream = STREAM * card.memory
    sizes = [job.micro_batch] * (job.local_batch // job.micro_batch)
    sizes += [job.local_batch % job.micro_batch] if job.local_batch % job.micro_batch else []
    seconds = {"pass 1": 0.0, "pass 2": 0.0}
    for rows in set(sizes):
        seconds["pass 2"] += sizes.count(rows) * survey.training.seconds(rows, matrix, matrix32, stream)
        if len(sizes) > 1:
            seconds["pass 1"] += sizes.count(rows) * survey.inference.seconds(rows, matrix, matrix32, stream)
    if job.teacher is not None:
        seconds["teacher"] = sum(
            sizes.count(rows) * job.teacher.inference.seconds(rows, matrix, matrix32, stream) for rows in set(sizes)
        )
    parked = sum(2 * survey.training.host_bytes(rows) for rows in sizes)
    products = card.attained("fp16" if job.loss is not None and job.loss.precision == "fast" else "fp32")
    seconds["loss"] = 6.0 * job.local_batch * job.local_batch * job.ranks * survey.embed_dim / products
    if job.teacher is not None:  # two sweeps, each with the logits of both models; gradients in one
        widths = 4.0 * survey.embed_dim + 2.0 * job.teacher.embed_dim
        seconds["loss"] += 2 * widths * job.local_batch * job.local_batch * job.ranks / card.attained("fp32")
    stage, part = int(zero.get("stage", 0)), survey.trainable / (job.ranks if zero.get("stage", 0) else 1)
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    seconds["optimizer"] = 7 * part / (HOST_BYTES if offloads else stream)
    seconds["host transfers"] = ((2 * part if offloads else 0.0) + parked) / BUS_BYTES
    if stage == 3 and job.ranks > 1 and (zero.get("offload_param") or {}).get("device", "none") != "none":
        seconds["host transfers"] += _fetched(survey, job) / job.ranks / BUS_BYTES
    seconds["links"] = sum(wire_bytes(survey, zero, job).values()) / link
    return seconds


def wire_bytes(survey: Survey, zero: dict[str, Any], job: Job) -> dict[str, float]:
    """Bytes that each rank sends in a step: its part of the collectives on weights and gradients, and the exchange of
    embeddings."""
    if job.ranks == 1:
        return {"gradients": 0.0, "weights": 0.0, "embeddings": 0.0}
    stage, others = int(zero.get("stage", 0)), (job.ranks - 1) / job.ranks
    reductions = job.num_micro_batches if job.reduces_early(survey, zero) else 1
    return {
        "gradients": others * survey.trainable * reductions,
        "weights": others * (_fetched(survey, job) if stage == 3 else survey.trainable),
        "embeddings": 4.0 * survey.embed_dim * job.local_batch * (2 * job.ranks - 1) + _lesson(survey, job),
    }


def _lesson(survey: Survey, job: Job) -> float:
    """Bytes of embeddings that distillation sends: both models' texts twice around, the student's gradient once."""
    if job.teacher is None:
        return 0.0
    widths = 2 * (survey.embed_dim + job.teacher.embed_dim) * (job.ranks - 1) + survey.embed_dim * job.ranks
    return 4.0 * job.local_batch * widths


def _fetched(survey: Survey, job: Job) -> float:
    """Bytes of weights that ZeRO-3 gathers in a step: in both passes forward and in the backward pass of every
    micro-batch."""
    count = job.num_micro_batches
    return survey.parameters * (3.0 * count - (1 if count == 1 else 0))
