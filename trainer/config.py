"""A recipe: one YAML file whose sections are the settings of the components they name.

    python -m trainer.train --help                                 # every key, its default and what it does
    python -m trainer.train trainer/recipes/glyphs.yaml optim.lr=1e-3 loss.tile_rows=256

A recipe decides what is computed, a file in ``ds_configs/`` where tensors live.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, ClassVar

import yaml
from pydantic import Field, model_validator

from trainer.checkpoint import CheckpointSettings
from trainer.core.help import describe
from trainer.core.settings import OPERATIONAL, Settings, override, parse, read_yaml
from trainer.core.shipped import shipped
from trainer.core.types import UserError
from trainer.data import DataSettings
from trainer.distill import DistillSettings
from trainer.engine import EngineSettings
from trainer.evals import EvalSettings, asked_for
from trainer.losses import AutoSettings, LossSettings
from trainer.metrics import LogSettings
from trainer.models import ModelSettings
from trainer.optim import AdamWSettings, OptimSettings
from trainer.step import BatchSettings


class RunSettings(Settings):
    """A run's directory, length and seed."""

    renamed: ClassVar = {"silence": "heartbeat_timeout"}

    directory: Annotated[Path, OPERATIONAL] = Path("runs/default")
    "Output directory; if it has checkpoints, the run is resumed."
    samples: int = Field(gt=0)
    "Pairs to train on, counting repeats; the run ends with the first global batch that reaches this number."
    seed: int = 0
    "Seed of the initial weights, the order of samples, augmentation and dropout."
    timeout: Annotated[float, OPERATIONAL] = Field(600.0, gt=0)
    """Seconds that ranks wait for a missing rank in a collective; then the run ends and names it. A whole checkpoint or
    evaluation may take longer."""
    heartbeat_timeout: Annotated[float, OPERATIONAL] = Field(20.0, ge=0)
    """End the job if a rank is silent for this many seconds (a rank that dies ends it at once); 0 disables the
    watchdog."""


class Recipe(Settings):
    """A recipe: everything that decides what is computed."""

    run: RunSettings
    "Directory, length, seed and timeouts."
    model: ModelSettings
    "The two towers, pretrained or from a config."
    data: DataSettings
    "Shards, loading, augmentation."
    loss: LossSettings = AutoSettings()
    "The objective and how ranks exchange embeddings."
    distill: DistillSettings | None = None
    "A teacher to learn from in addition to the pairs; null: none."
    batch: BatchSettings
    "Global batch and micro-batch."
    optim: OptimSettings = AdamWSettings()
    "The optimizer, its schedule, clipping and what happens at gradient spikes."
    engine: EngineSettings = EngineSettings()
    "DeepSpeed: which ds_config, which precision."
    checkpoint: Annotated[CheckpointSettings, OPERATIONAL] = CheckpointSettings()
    "When to save, what to keep, what to resume from."
    log: Annotated[LogSettings, OPERATIONAL] = LogSettings()
    "Progress line and trackers."
    eval: Annotated[EvalSettings, OPERATIONAL] = EvalSettings()
    "Retrieval and zero-shot during training and by `python -m trainer.evaluate`."

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.run.samples < self.batch.size:
            raise ValueError(
                f"run.samples is {self.run.samples}, less than one global batch (batch.size {self.batch.size})"
            )
        if self.eval.patience and not self.checkpoint.best:
            raise ValueError("eval.patience: set checkpoint.best, the metric that has to improve: image_to_text_r1")
        if self.checkpoint.best and not (self.eval.every and asked_for(self.eval, self.data)):
            missing = "eval.every" if not self.eval.every else "data.validation, or eval.data"
            raise ValueError(f"checkpoint.best: nothing is evaluated during this run: set {missing}")
        if self.distill is not None and self.model.precomputed.side is not None:
            raise ValueError(
                "distill.teacher would have to see what is not read where embeddings are stored; take "
                "model.precomputed out"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.run.samples // self.batch.size)


def load(path: Path, assignments: list[str] | None = None) -> Recipe:
    """The recipe in ``path`` (or a shipped one by its name, such as ``glyphs``) with ``section.key=value`` overrides.
    Raises UserError that names file and key."""
    named = shipped("recipes") / f"{path}.yaml"
    if not path.exists() and named.is_file():
        path = named
    return parse(Recipe, override(read_yaml(path), assignments or []), str(path))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML with every key, to document a run and to load it again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=140)


def from_command_line(prog: str, about: str, argv: list[str]) -> Recipe:
    """Parses ``RECIPE [section.key=value ...]``; ignores the ``--local_rank`` that the deepspeed launcher adds."""
    parser = argparse.ArgumentParser(
        prog=prog, description=about, epilog=describe(Recipe), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help="a YAML file, or the name of a shipped recipe (trainer/recipes/)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="override the recipe; values are parsed as YAML",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(f"{rest[0]!r} is not an option: write settings as section.key=value, without dashes")
    return load(options.recipe, options.overrides)
