"""Evaluation: image-text retrieval and zero-shot classification.

    metrics = run(engine, settings, model.preprocess, rank, world, data=recipe.data)
    # {"image_to_text_r1": 0.78, "face_top1": ...}

All ranks call it and get the same numbers; each embeds its share. Every rank calls the model equally often, so it works
at any ZeRO stage.
"""

from trainer.evals.check import asked_for, check
from trainer.evals.history import History, read_history
from trainer.evals.run import Evaluation, Retrieved, brief, evaluate, run
from trainer.evals.settings import EvalSettings, ZeroShotSettings

__all__ = [
    "EvalSettings",
    "Evaluation",
    "History",
    "Retrieved",
    "ZeroShotSettings",
    "asked_for",
    "brief",
    "check",
    "evaluate",
    "read_history",
    "run",
]
