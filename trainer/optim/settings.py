"""The ``optim:`` section of a recipe: the optimizer, its rate as a function of the samples seen, and limits.

optimizer = build_optimizer(model, settings)
rate = learning_rate(settings, samples_seen, total_samples)
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from trainer.core.settings import Settings
from trainer.optim.moments import Format

NEW_RATE = 1e-3
"""AdamW's peak rate for weights that are new."""


class SpikeSettings(Settings):
    """What to do with a step whose gradient norm is far above those before it."""

    action: Literal["count", "skip", "clip"] = "count"
    "count: only report it; skip: do not update the weights; clip: scale the gradient down to the limit."
    factor: float = Field(default=10.0, gt=1)
    "A spike is a norm above this many times the median of the last `window` steps."
    window: int = Field(default=100, ge=1)
    "Number of past steps to compare with; there are no spikes before a tenth of them are known."


class OptimizerSettings(Settings):
    """Keys of all optimizers: rate, schedule, clipping, averaging and gradient spikes."""

    rate_of_adamw: ClassVar[float] = 1.0
    """The usual rate, in AdamW's."""

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate. auto depends on what is trained: 1e-3 for new weights, 1e-5 for whole pretrained towers, 2e-4
    for LoRA; each part of a mixed model gets its own rate; with lion a tenth of these."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of matrices, multiplied by the rate in each step; vectors (norms, biases), the scale and
    the bias are not decayed. CLIP: 0.2. SigLIP's 1e-4 is not multiplied by its rate of 1e-3: it corresponds to 0.1
    here."""
    warmup: float = Field(default=0.05, ge=0)
    "Linear warm-up: a fraction of the run below 1, else a number of samples."
    schedule: Literal["cosine", "constant"] = "cosine"
    "What follows the warm-up: cosine decay to `final`, or the peak rate."
    final: float = Field(default=0.0, ge=0, le=1)
    "Fraction of the peak rate at the end of a cosine."
    clip: float = Field(default=1.0, ge=0)
    "Clip the norm of the global gradient to this; 0: no clipping."
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of a running average of the weights, kept in float32 with the optimizer's moments (4 bytes per
    trained parameter) and in every checkpoint. Evaluations during training use it ("weights": "ema" in log.jsonl), as
    do `evaluate --ema` and `export --ema`; without --ema they use the weights. 0: none; 0.999 averages about the last
    thousand steps."""
    spike: SpikeSettings = SpikeSettings()
    "Gradient-norm spikes."
    max_bad_steps: int = Field(default=10, ge=1)
    "The run ends after this many consecutive steps with a non-finite loss or gradient (each is skipped)."
    max_scale: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Upper limit of the scale t = exp(logit_scale), never below a pretrained model's own. null: no limit; auto: 100
    with a softmax loss, as in CLIP, else none."""

    @property
    def peak(self) -> float:
        """``lr`` as a number; an unresolved `auto` counts as that for new weights."""
        return NEW_RATE * self.rate_of_adamw if self.lr == "auto" else self.lr


class AdamWSettings(OptimizerSettings):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    "First-moment decay."
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Second-moment decay; at large batch 0.999 forgets a gradient spike too slowly and training diverges (SigLIP,
    arXiv 2303.15343, 4.6)."""
    eps: float = Field(default=1e-8, gt=0)
    "Added to the root of the second moment."
    moments: Format = "float32"
    """Format of the two moments: float32, 8 bytes per trained parameter; bfloat16, 4 (rounded stochastically); int8,
    2.03 (blocks of 256 elements, Dettmers et al., arXiv 2110.02861; parameters under 4,096 elements stay float32)."""


class AdafactorSettings(OptimizerSettings):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) as in big_vision's SigLIP: about 2 bytes per trained
    parameter."""

    name: Literal["adafactor"] = "adafactor"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    "Decay of the momentum of updates."
    beta2: float = Field(default=0.95, gt=0, lt=1)
    "Cap of the second-moment decay, which is 1 - step^-0.8 below it."
    eps: float = Field(default=1e-30, gt=0)
    "Added to the square of the gradient."
    moments: Format = "bfloat16"
    "Format of the momentum: 2 bytes per trained parameter in bfloat16. Second moments are float32 and tiny."


class LionSettings(OptimizerSettings):
    """Lion (Chen et al., arXiv 2302.06675): the sign of a momentum. 4 bytes per trained parameter. Every element moves
    by the rate itself: use a third to a tenth of AdamW's optim.lr, and 3 to 10 times its optim.weight_decay."""

    rate_of_adamw: ClassVar[float] = 0.1
    name: Literal["lion"] = "lion"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    "Weight of the momentum in the update."
    beta2: float = Field(default=0.99, ge=0, lt=1)
    "Decay of the momentum."
    moments: Format = "float32"
    "Format of the momentum; see adamw."


class MuonSettings(OptimizerSettings):
    """Muon (https://kellerjordan.github.io/posts/muon) for the matrices, at AdamW's rate and decay (arXiv 2502.16982);
    AdamW for embeddings, convolutions, vectors, scale and bias. 4 bytes an element of a matrix, 8 elsewhere."""

    name: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    "Nesterov momentum of the matrices."
    beta1: float = Field(default=0.9, ge=0, lt=1)
    "First-moment decay of the other parameters."
    beta2: float = Field(default=0.95, ge=0, lt=1)
    "Second-moment decay of the other parameters."
    eps: float = Field(default=1e-8, gt=0)
    "Added to the root of the second moment of the other parameters."


class LambSettings(OptimizerSettings):
    """LAMB (You et al., arXiv 1904.00962): AdamW whose step on a tensor is scaled to the tensor's norm."""

    name: Literal["lamb"] = "lamb"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    "First-moment decay."
    beta2: float = Field(default=0.95, ge=0, lt=1)
    "Second-moment decay."
    eps: float = Field(default=1e-6, gt=0)
    "Added to the root of the second moment."
    moments: Format = "float32"
    "Format of the two moments; see adamw."


OptimSettings = Annotated[
    AdamWSettings | AdafactorSettings | LionSettings | MuonSettings | LambSettings,
    Field(discriminator="name"),
]


def learning_rate(settings: OptimizerSettings, samples_seen: int, total_samples: int) -> float:
    """The rate of the step after ``samples_seen`` of ``total_samples``; a pure function, so a resumed run cannot
    differ."""
    warmup = settings.warmup * total_samples if settings.warmup < 1 else settings.warmup
    if samples_seen < warmup:
        return settings.peak * samples_seen / warmup
    if settings.schedule == "constant":
        return settings.peak
    progress = min(1.0, (samples_seen - warmup) / max(1.0, total_samples - warmup))
    return settings.peak * (settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress)))


def scale_ceiling(settings: OptimizerSettings, start_scale: float) -> float | None:
    """The largest scale t the loss may see: the recipe's, but never below what the model starts at.

    SigLIP So400m ships logit_scale 4.72, above CLIP's ln 100: a fixed clamp would change the model at step 1.
    """
    ceiling = settings.max_scale
    return None if ceiling is None or ceiling == "auto" else max(ceiling, start_scale)
