"""Optimizers, the learning rate as a function of the samples seen, and the guard that handles bad gradients.

optimizer = build_optimizer(model, settings)
rate = learning_rate(settings, samples_seen, total_samples)
verdict = guard.judge(norm)                # "step" | "skip" | "clip"

A recipe's ``optim:`` section chooses by ``name``. All are exact at every ZeRO stage, on any number of ranks, offloaded
or not: an optimizer that needs more of a tensor than this rank has gets it from the other ranks
(trainer/core/partitioned.py).
"""

from trainer.optim.build import Shapes, build_optimizer, matrices, moment_bytes, trained_shapes
from trainer.optim.guard import Guard, Verdict
from trainer.optim.settings import (
    NEW_RATE,
    AdafactorSettings,
    AdamWSettings,
    LambSettings,
    LionSettings,
    MuonSettings,
    OptimizerSettings,
    OptimSettings,
    SpikeSettings,
    learning_rate,
    scale_ceiling,
)

__all__ = [
    "NEW_RATE",
    "AdafactorSettings",
    "AdamWSettings",
    "Guard",
    "LambSettings",
    "LionSettings",
    "MuonSettings",
    "OptimSettings",
    "OptimizerSettings",
    "Shapes",
    "SpikeSettings",
    "Verdict",
    "build_optimizer",
    "learning_rate",
    "matrices",
    "moment_bytes",
    "scale_ceiling",
    "trained_shapes",
]
