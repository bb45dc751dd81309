"""Every way to run a recipe on given GPUs: what fits, how fast it is, and which to take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trainer.engine.ds_config import FOLDER, complete, load
from trainer.plan.memory import Job, Peak, forecast
from trainer.plan.profile import Survey
from trainer.plan.roofline import Card, step_seconds

RESERVE = 1 << 30
USABLE = 0.95


@dataclass(frozen=True)
class Way:
    """How a model may be laid out: a survey of it, and the recipe keys that give it."""

    label: str
    overrides: tuple[str, ...]
    survey: Survey
    same_training: bool
    """True where only memory and speed differ from the recipe, not what is learnt."""


@dataclass(frozen=True)
class Option:
    """One line of the table."""

    ds_config: str
    way: Way
    grad_reduction: str
    fits: bool
    micro_batch: int
    """The largest that fits; 1 where none does."""
    peak: Peak
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return sum(self.seconds.values())

    def overrides(self) -> list[str]:
        """The keys that make a recipe run this way."""
        keys = [f"engine.ds_config={self.ds_config}", f"batch.micro_batch={self.micro_batch}"]
        return (
            keys
            + ([f"batch.grad_reduction={self.grad_reduction}"] if self.grad_reduction != "auto" else [])
            + list(self.way.overrides)
        )


def usable_bytes(memory_bytes: float, reserve: float = RESERVE) -> float:
    """What tensors may take of a card: without the CUDA context, cuBLAS and NCCL (``reserve``), and a share for
    fragmentation."""
    return max(0.0, USABLE * (memory_bytes - reserve))


def ds_configs() -> dict[str, dict[str, Any]]:
    """Name -> completed ``zero_optimization`` of every file in ds_configs/."""
    return {file.stem: zero_section(file.stem) for file in sorted(FOLDER.glob("*.json"))}


def zero_section(name: str) -> dict[str, Any]:
    """The ``zero_optimization`` that DeepSpeed will be given."""
    return complete(load(name), 0.0)["zero_optimization"]


def largest(survey: Survey, zero: dict[str, Any], job: Job, budget: float) -> tuple[int, Peak]:
    """The largest micro-batch up to the local batch whose peak stays within ``budget`` bytes (0 when none does) and
    that peak.

    Micro-batches are then evened out: the same number of them, of equal size.
    """

    def peak(rows: int) -> Peak:
        return forecast(survey, zero, replace(job, micro_batch=rows))

    if peak(1).total > budget:
        return 0, peak(1)
    # A single pass (the whole local batch at once) has other phases than two, so it is asked for by itself.
    if peak(job.local_batch).total <= budget:
        return job.local_batch, peak(job.local_batch)
    low, high = 1, job.local_batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle).total <= budget else (low, middle)
    even = -(-job.local_batch // -(-job.local_batch // low))
    return even, peak(even)


def options(
    ways: list[Way], job: Job, budget: float, card: Card, precision: str, link: float, tflops: float | None = None
) -> list[Option]:
    """Every ds_config times every way, with the reduction that the stage allows when the recipe's own does not fit."""
    found = []
    for way in ways:
        for name, zero in ds_configs().items():
            option = _option(way, name, zero, job, budget, card, precision, link, tflops)
            if not option.fits and zero["stage"] >= 2 and not job.reduces_early(way.survey, zero):
                sharded = _option(
                    way,
                    name,
                    zero,
                    replace(job, grad_reduction="per_micro_batch"),
                    budget,
                    card,
                    precision,
                    link,
                    tflops,
                )
                option = sharded if sharded.fits else option
            found.append(option)
    return found


def _option(
    way: Way,
    name: str,
    zero: dict[str, Any],
    job: Job,
    budget: float,
    card: Card,
    precision: str,
    link: float,
    tflops: float | None,
) -> Option:
    rows, peak = largest(way.survey, zero, job, budget)
    seconds = step_seconds(way.survey, zero, replace(job, micro_batch=max(rows, 1)), card, precision, link, tflops)
    return Option(name, way, job.grad_reduction, rows > 0, max(rows, 1), peak, seconds)


def choose(found: list[Option]) -> Option | None:
    """The fastest option that trains what the recipe says; among those within 2%, the one with the most memory to
    spare."""
    fitting = [option for option in found if option.fits and option.way.same_training]
    if not fitting:
        return None
    best = min(option.step_seconds for option in fitting)
    return min(
        (option for option in fitting if option.step_seconds <= 1.02 * best), key=lambda option: option.peak.total
    )
