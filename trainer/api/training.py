"""``ringlip.train``: a run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import config
from trainer import train as command
from trainer.config import Recipe
from trainer.core.settings import override, parse
from trainer.run import Hook, Run


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; equal on all ranks."""

    directory: Path
    """The run directory: checkpoints, log.jsonl, recipe.yaml."""
    samples_seen: int
    """Pairs trained on, over all ranks, since the run began."""
    metrics: dict[str, Any]
    """The last value of everything in log.jsonl: loss, grad_norm, scale, bias, lr, eval, ..."""
    exit_reason: Literal["finished", "stopped"]
    """stopped: by a signal, after saving; the same call resumes from there."""


def train(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] | None = None
) -> TrainResult:
    """Trains as ``python -m trainer.train`` does, in this process: one rank, or one of many under any launcher.

    An existing process group is used and stays open. A run directory with checkpoints is resumed.

    Args:
        recipe: a YAML file, the name of a recipe that comes with RingLIP, or the sections as a mapping.
        overrides: new values of keys: ``{"optim.lr": 1e-3}``, ``{"optim": {"lr": 1e-3}}`` or ``["optim.lr=1e-3"]``.

    Raises:
        UserError: a mistake in the recipe or the data; the message is one line with file or key and remedy.
    """
    settings = read_recipe(recipe, overrides)
    ended: list[int] = []

    def note(run: Run) -> None:
        ended.append(run.samples_seen)

    code = command.start(settings, [Hook("noting the end", 0, note, at_end=True, at_stop=True)])
    seen = ended[-1] if ended else settings.num_steps * settings.batch.size  # it was finished before
    reason: Literal["finished", "stopped"] = "finished" if code == 0 else "stopped"
    return TrainResult(settings.run.directory, seen, _last_values(settings.run.directory), reason)


def read_recipe(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] | None = None
) -> Recipe:
    """A recipe from a file, by its name or from its sections, with ``overrides`` applied."""
    if isinstance(recipe, Mapping):
        return parse(Recipe, override(dict(recipe), _assignments(overrides)), "recipe")
    return config.load(Path(recipe), _assignments(overrides))


def _assignments(overrides: Mapping[str, Any] | Sequence[str] | None, prefix: str = "") -> list[str]:
    """Overrides as written on the command line; JSON is valid YAML."""
    if not isinstance(overrides, Mapping):
        return list(overrides or [])
    found: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            found += _assignments(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value, default=str)}")
    return found


def _last_values(directory: Path) -> dict[str, Any]:
    path = directory / "log.jsonl"
    values: dict[str, Any] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            values |= json.loads(line)
    return values
