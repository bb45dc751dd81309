"""What a line of the table is, and what several sections need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trainer.core import distributed


class Measured(NamedTuple):
    """What a check found: a text for the table, and whether it meets the criterion (None: there is none to meet)."""

    text: str
    ok: bool | None
    facts: dict[str, Any] = {}  # noqa: RUF012 (a default that nobody changes)
    """Numbers for the JSON."""


@dataclass(frozen=True)
class Check:
    """A line: what is claimed, by which criterion, and the function that measures it."""

    name: str
    criterion: str
    run: Callable[[], Measured]


class Skip(Exception):
    """Raised by a check that this machine cannot make; the message is the reason."""


def below(value: float, limit: float, unit: str = "") -> Measured:
    """A value that must not exceed its limit."""
    return Measured(f"{value:.3g}{unit}", value <= limit, {"value": value})


def worst(errors: dict[str, float], limit: float) -> Measured:
    """The largest of several errors, with its name."""
    name = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return Measured(f"{errors[name]:.2e} ({name})", all(error <= limit for error in errors.values()), errors)


def on_gpu() -> bool:
    return distributed.device().type == "cuda"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], rounds: int = 5, warmups: int = 2) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warmups):
        work()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest memory of tensors during a call, beyond what was there before."""
    if not on_gpu():
        raise Skip("counted by the CUDA allocator")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
