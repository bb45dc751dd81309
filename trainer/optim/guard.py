"""The guard that decides what to do with a bad gradient.

verdict = guard.judge(norm)                # "step" | "skip" | "clip"
guard.check()                              # raises UserError when the run has diverged
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

from trainer.core.types import UserError
from trainer.optim.settings import OptimizerSettings

Verdict = Literal["step", "skip", "clip"]


class Guard:
    """Counts bad steps and judges gradients by the norms before them; equal on all ranks because the norms are."""

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.norms: deque[float] = deque(maxlen=settings.spike.window)
        self.num_spikes = 0
        self.num_bad_steps = 0
        self._bad_in_a_row = 0

    @property
    def limit(self) -> float | None:
        """The norm above which a gradient is a spike; None while too little is known."""
        spike = self.settings.spike
        if len(self.norms) < max(1, spike.window // 10):
            return None
        return spike.factor * median(self.norms)

    def judge(self, norm: float) -> Verdict:
        """Decides on a gradient of this norm (inf or nan: the loss or the gradient was not finite)."""
        if not math.isfinite(norm):
            self.num_bad_steps += 1
            self._bad_in_a_row += 1
            return "skip"
        self._bad_in_a_row = 0
        limit = self.limit
        self.norms.append(norm if limit is None else min(norm, limit))  # a spike must not hide those that follow
        if limit is None or norm <= limit:
            return "step"
        self.num_spikes += 1
        return {"count": "step", "skip": "skip", "clip": "clip"}[self.settings.spike.action]  # type: ignore[return-value]

    def check(self) -> None:
        """Raises UserError after ``max_bad_steps`` non-finite steps in a row: continuing would only waste time."""
        if self._bad_in_a_row >= self.settings.max_bad_steps:
            raise UserError(
                f"training diverged: loss or gradient was not finite in {self._bad_in_a_row} steps in a row "
                "(log.jsonl names their samples); resume from the last checkpoint with a lower optim.lr, a longer "
                "optim.warmup, optim.clip 1.0, or optim.spike.action skip"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state that exact resume needs; plain numbers."""
        return {
            "norms": list(self.norms),
            "num_spikes": self.num_spikes,
            "num_bad_steps": self.num_bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of ``state_dict``."""
        self.norms = deque(state["norms"], maxlen=self.settings.spike.window)
        self.num_spikes, self.num_bad_steps = state["num_spikes"], state["num_bad_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]
