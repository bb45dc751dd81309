"""How far to go from the base to what was trained: as far as the general set loses at most a point (WiSE-FT, arXiv
2109.01903)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import checkpoint
from trainer.blend import blend, whole
from trainer.config import Recipe
from trainer.core import distributed
from trainer.evals import Evaluation, evaluate
from trainer.finetune.choose import Plan
from trainer.models import DualEncoder, ModelSettings, build

LOSS = 0.01
"""What the general set may lose."""
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
"""Of the trained weights; the largest that keeps what must be kept is taken."""


@dataclass(frozen=True)
class Scores:
    """Means of the metrics that count, in [0, 1]."""

    own: float
    general: float | None

    @classmethod
    def of(cls, plan: Plan, metrics: dict[str, float]) -> Scores:
        """Those of ``plan`` in the metrics of an evaluation."""
        own, general = ([metrics[name] for name in names] for names in (plan.own, plan.general))
        return cls(sum(own) / len(own), sum(general) / len(general) if general else None)

    def lost(self, base: Scores) -> float:
        """What the general set has lost; 0 without one."""
        return 0.0 if self.general is None or base.general is None else base.general - self.general

    def words(self) -> str:
        """In percent, for a line."""
        general = "" if self.general is None else f"; general set {100 * self.general:.1f}"
        return f"{100 * self.own:.1f}{general}"


def tuned_of(recipe: Recipe, path: str, source: Path) -> DualEncoder:
    """The model in a checkpoint of the run, an adapter merged into it."""
    tuned = whole(checkpoint.load_model(recipe.model, source)[0]).to(distributed.device()).eval()
    tuned.settings = tuned.settings.model_copy(update={"path": path})
    return tuned


def mix(
    plan: Plan, base: DualEncoder, tuned: DualEncoder, recipe: Recipe, start: Scores, shares: Sequence[float] = SHARES
) -> tuple[float, DualEncoder, Evaluation]:
    """(share of the trained weights, that model, what it can do)."""
    for share in shares:
        model = tuned if share == 1 else _between(base, tuned, share)
        found = measure(model, recipe)
        scores = Scores.of(plan, found.metrics)
        if scores.lost(start) <= LOSS:
            return share, model, found
    return 0.0, base, measure(base, recipe)


def base_of(recipe: Recipe, path: str) -> DualEncoder:
    """The model that the run began with, for images and captions of the run's sizes."""
    sizes = {key: getattr(recipe.model, key) for key in ("image_size", "num_patches", "num_tokens")}
    return build(ModelSettings(path=path, **sizes)).to(distributed.device()).eval()


def _between(base: DualEncoder, tuned: DualEncoder, share: float) -> DualEncoder:
    return blend([copy.deepcopy(tuned), base], [share, 1 - share], ["the run", "the model that it began with"])


def measure(model: DualEncoder, recipe: Recipe) -> Evaluation:
    """What a model can do on the recipe's own and general sets."""
    return evaluate(model, recipe.eval, model.preprocess, 0, 1, recipe.data)
