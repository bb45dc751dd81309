"""Measures throughput, memory and the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import psutil
import torch

from trainer.core import collectives, distributed


class Reading(NamedTuple):
    """Values since the last reading. ``data_wait`` is a share of the time; it and ``memory_bytes`` are the worst
    rank's."""

    steps: int
    samples: int
    seconds: float
    memory_bytes: int
    data_wait: float
    slowest_rank: int
    """The rank with the longest time for data and embedding, until ranks first wait for each other."""
    rank_seconds: tuple[float, float, float]
    """That time per step, of the fastest, the median and the slowest rank."""


class Stopwatch:
    """Measures device time between ``start`` and ``stop`` without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        self._times[which] = time.perf_counter()
        if self._events:
            self._events[which].record()

    def seconds(self) -> float:
        """Seconds between the two; call it when the device has passed ``stop``."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]


class Meter:
    """One rank's clock. Time inside ``paused`` does not count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Training time since the meter was created."""
        self._restart()

    def _restart(self) -> None:
        self._begin, self._paused, self._waited = time.monotonic(), 0.0, 0.0
        self._steps, self._samples, self._local = 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wrap the wait for data in this."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wrap what is not training in this: evaluation, checkpoints."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begin

    def step(self, samples: int, local_seconds: float = 0.0) -> None:
        """Counts a step of ``samples`` pairs over all ranks, of which this rank computed for ``local_seconds`` by
        itself."""
        self._steps += 1
        self._samples += samples
        self._local += local_seconds

    def pairs_per_second(self) -> float:
        """Since the last reading, as this rank sees it; 0 before the first step."""
        return self._samples / max(time.monotonic() - self._begin - self._paused, 1e-9)

    def read(self) -> Reading:
        """A collective: the values of this interval over all ranks. Starts the next interval."""
        seconds = max(time.monotonic() - self._begin - self._paused, 1e-9)
        waits, memory, local = _gather([self._waited, float(memory_bytes()), self._waited + self._local])
        # Compares seconds, not shares: the intervals of ranks that do not wait for each other differ in length.
        steps = max(self._steps, 1)
        spread = min(local) / steps, median(local) / steps, max(local) / steps
        slowest = local.index(max(local))
        reading = Reading(
            self._steps, self._samples, seconds, int(max(memory)), min(max(waits) / seconds, 1.0), slowest, spread
        )
        self.seconds += seconds
        self._restart()
        return reading


def memory_bytes() -> int:
    """On a GPU, the peak since the last call; on a CPU, the current resident memory."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_info().rss
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _gather(values: list[float]) -> list[list[float]]:
    """Each value on all ranks: [value][rank]."""
    mine = torch.tensor(values, dtype=torch.float64, device=distributed.device())
    return collectives.stack_over_ranks(mine).T.tolist()
