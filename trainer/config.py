"""A recipe: one YAML file whose sections are the settings of the components they name.

    python -m trainer.train --help                                 # every key, its default and what it does
    python -m trainer.train trainer/recipes/glyphs.yaml optim.lr=1e-3 loss.tile_rows=256

What is computed stands here; where tensors live stands in ``ds_configs/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, model_validator

from trainer.checkpoint import CheckpointSettings
from trainer.core.settings import Settings, describe, override, parse, read_yaml
from trainer.core.types import UserError
from trainer.data import DataSettings
from trainer.distill import DistillSettings
from trainer.engine import EngineSettings
from trainer.evals import EvalSettings
from trainer.losses import LossSettings, SigmoidSettings
from trainer.metrics import LogSettings
from trainer.models import ModelSettings
from trainer.optim import OptimSettings
from trainer.step import BatchSettings


class RunSettings(Settings):
    """What a run is called and how long it is."""

    renamed: ClassVar = {"silence": "heartbeat_timeout"}

    directory: Path = Path("runs/default")
    "Where everything the run writes goes; a run that is there already is resumed."
    samples: int = Field(gt=0)
    "Pairs to train on, repeats counted; the run ends at the first global batch that reaches it."
    seed: int = 0
    "Fixes the initial weights, the order of samples, augmentation and dropout."
    timeout: float = Field(600.0, gt=0)
    "Seconds after which a rank that hears nothing from its peers in a collective gives up."
    heartbeat_timeout: float = Field(20.0, ge=0)
    """Seconds without a sign of life of a machine or a process that end the job (one that dies ends it at once); 0: no
    watchdog."""


class Recipe(Settings):
    """All that decides what is computed."""

    run: RunSettings
    "Name, length and seed."
    model: ModelSettings
    "The two towers, pretrained or from a config."
    data: DataSettings
    "Shards, loading, augmentation."
    loss: LossSettings = SigmoidSettings()
    "The objective and how ranks exchange embeddings."
    distill: DistillSettings | None = None
    "A teacher to learn from beside the pairs; null: none."
    batch: BatchSettings
    "Global batch and micro-batch."
    optim: OptimSettings = OptimSettings()
    "AdamW, its schedule, clipping and what happens at gradient spikes."
    engine: EngineSettings = EngineSettings()
    "DeepSpeed: which ds_config, which precision."
    checkpoint: CheckpointSettings = CheckpointSettings()
    "When to save, what to keep, what to resume from."
    log: LogSettings = LogSettings()
    "Progress line and trackers."
    eval: EvalSettings = EvalSettings()
    "Retrieval and zero-shot during training and by `python -m trainer.evaluate`."

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.run.samples < self.batch.size:
            raise ValueError(
                f"run.samples is {self.run.samples}, less than one global batch (batch.size {self.batch.size})"
            )
        if self.distill is not None and self.model.precomputed.side is not None:
            raise ValueError(
                "distill.teacher would have to see what is not read where embeddings are stored; take model.precomputed out"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.run.samples // self.batch.size)


NOT_LEARNT = (
    *(
        "run.directory",
        "run.timeout",
        "run.heartbeat_timeout",
        "batch.micro_batch",
        "batch.grad_reduction",
        "engine.ds_config",
        "checkpoint",
        "log",
        "eval",
    ),
    *(
        "loss.tile_rows",
        "loss.exchange",
        "loss.node_size",
        "model.attention",
        "model.recompute",
        "data.validation",
        "data.workers",
    ),
    *(
        "data.prefetch",
        "data.cache_decoded",
        "data.cache_dir",
        "data.cache_limit",
        "data.check_digests",
        "data.stall_seconds",
    ),
)
"""Keys and sections that change what a run costs, keeps or says, and nothing of what it learns."""


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """ "loss.name sigmoid -> softmax" for every key by which two recipes (as ``dump`` writes them) learn something
    else."""
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        name, old, new = prefix + key, before.get(key), now.get(key)
        if name in NOT_LEARNT or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{name}.")
        else:
            found.append(f"{name} {old} -> {new}")
    return found


def load(path: Path, assignments: list[str] | None = None) -> Recipe:
    """The recipe in ``path`` with ``section.key=value`` laid over it; UserError names file and key."""
    return parse(Recipe, override(read_yaml(path), assignments or []), str(path))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, so that a run directory explains itself and loads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=140)


def from_command_line(prog: str, about: str, argv: list[str]) -> Recipe:
    """Reads ``RECIPE [section.key=value ...]``; the ``--local_rank`` that the deepspeed launcher adds is not ours to
    use."""
    parser = argparse.ArgumentParser(
        prog=prog, description=about, epilog=describe(Recipe), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a YAML file; trainer/recipes/ holds those that come with RingLIP"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="laid over the recipe; values are read as YAML",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(f"{rest[0]!r} is not an option: settings are written section.key=value, without dashes")
    return load(options.recipe, options.overrides)
