"""AdamW, its rate as a function of the samples seen, and the guard that decides what becomes of a bad gradient.

optimizer = build_optimizer(model, settings)
rate = learning_rate(settings, samples_seen, total_samples)
verdict = guard.judge(norm)                # "step" | "skip" | "clip"
guard.check()                              # raises UserError when the run has diverged
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from trainer.core.settings import Settings
from trainer.core.types import UserError


class SpikeSettings(Settings):
    """What to do with a step whose gradient norm leaps out of those before it."""

    action: Literal["count", "skip", "clip"] = "count"
    "count only reports it; skip leaves the weights as they are; clip scales the gradient down to the limit."
    factor: float = Field(default=10.0, gt=1)
    "A spike is a norm above this many times the median of the last `window` steps."
    window: int = Field(default=100, ge=1)
    "Steps whose norms are remembered; nothing counts as a spike before a tenth of them are known."


class OptimSettings(Settings):
    """AdamW with warm-up and cosine decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = Field(default=1e-3, gt=0)
    "Peak learning rate."
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of matrices; vectors (norms, biases), the scale and the bias are never decayed. SigLIP:
    1e-4, CLIP: 0.2."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    "First-moment decay."
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Second-moment decay; at large batch 0.999 forgets a gradient spike too slowly and training diverges (SigLIP,
    arXiv 2303.15343, 4.6)."""
    eps: float = Field(default=1e-8, gt=0)
    "Added to the root of the second moment."
    warmup: float = Field(default=0.05, ge=0)
    "Linear warm-up: a fraction of the run below 1, else a number of samples."
    schedule: Literal["cosine", "constant"] = "cosine"
    "What follows the warm-up: cosine decay to `final`, or the peak rate."
    final: float = Field(default=0.0, ge=0, le=1)
    "Fraction of the peak rate at the end of a cosine."
    clip: float = Field(default=1.0, ge=0)
    "Largest norm of the global gradient; 0 switches clipping off."
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay a step of a running average of the weights, kept in float32 beside the optimizer's moments (4 bytes a
    trained parameter) and in every checkpoint. Evaluations during training are of it ("weights": "ema" in log.jsonl),
    as with `evaluate --ema` and `export --ema`; `evaluate` without --ema scores the weights themselves. 0: none; 0.999
    averages about the last thousand steps."""
    spike: SpikeSettings = SpikeSettings()
    "Gradient-norm spikes."
    max_bad_steps: int = Field(default=10, ge=1)
    "Steps in a row with a loss or gradient that is not finite (each is skipped) before the run ends."
    max_scale: float | None = Field(default=None, gt=0)
    """Ceiling of the scale t = exp(logit_scale), CLIP: 100. Never below what a pretrained model starts at. None: no
    ceiling."""


def learning_rate(settings: OptimSettings, samples_seen: int, total_samples: int) -> float:
    """The rate of the step that begins after ``samples_seen`` of ``total_samples``: pure, so a resumed run cannot
    differ."""
    warmup = settings.warmup * total_samples if settings.warmup < 1 else settings.warmup
    if samples_seen < warmup:
        return settings.lr * samples_seen / warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = min(1.0, (samples_seen - warmup) / max(1.0, total_samples - warmup))
    return settings.lr * (settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(
    model: nn.Module, settings: OptimSettings, groups: Iterable[tuple[list[str], float, bool]] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. ``groups`` says (names, factor on the rate, decayed?), as
    ``DualEncoder.parameter_groups`` does; without it all learn at one rate, and those of one dimension or none (norms,
    biases, scale, bias) are not decayed.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError(
            "model: every parameter is locked, there is nothing to train; unlock a tower, or the scale and bias"
        )
    if groups is None:
        groups = [
            ([name for name, p in trainable.items() if (p.dim() > 1) is decayed], 1.0, decayed)
            for decayed in (True, False)
        ]
    # ``rate`` is what Engine.set_learning_rate multiplies by.
    options: list[dict[str, Any]] = [
        {
            "params": [trainable[name] for name in names],
            "rate": rate,
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for names, rate, decayed in groups
        if names
    ]
    # The fused kernel works on CPU tensors too (offloaded optimizer states) and needs no compiler, as DeepSpeed's own
    # does.
    return torch.optim.AdamW(
        options, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def scale_ceiling(settings: OptimSettings, start_scale: float) -> float | None:
    """The largest scale t the loss may see: the recipe's, but never below what the model starts at.

    SigLIP So400m ships logit_scale 4.72, above CLIP's ln 100: a fixed clamp would change the model at step 1.
    """
    return None if settings.max_scale is None else max(settings.max_scale, start_scale)


Verdict = Literal["step", "skip", "clip"]


class Guard:
    """Counts bad steps and judges gradients by the norms before them; equal on all ranks because the norms are."""

    def __init__(self, settings: OptimSettings) -> None:
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
        """What to do with a gradient of this norm (inf or nan: the loss or the gradient was not finite)."""
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
        """Raises UserError after ``max_bad_steps`` steps in a row that were not finite: going on would only burn
        time."""
        if self._bad_in_a_row >= self.settings.max_bad_steps:
            raise UserError(
                f"training diverged: loss or gradient was not finite in {self._bad_in_a_row} steps in a row "
                "(log.jsonl names their samples); resume from the last checkpoint with a lower optim.lr, a longer "
                "optim.warmup, optim.clip 1.0, or optim.spike.action skip"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would have; plain numbers."""
        return {
            "norms": list(self.norms),
            "num_spikes": self.num_spikes,
            "num_bad_steps": self.num_bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave."""
        self.norms = deque(state["norms"], maxlen=self.settings.spike.window)
        self.num_spikes, self.num_bad_steps = state["num_spikes"], state["num_bad_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]
