"""TensorBoard, Weights & Biases, trackio and MLflow, through accelerate's tracker classes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from trainer.core.types import UserError


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is missing; on every rank, so that none waits for another."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"log.trackers: {', '.join(missing)} is not installed: pip install {' '.join(missing)}, or remove it"
        )


MLFLOW_RUN = "mlflow_run.txt"


class Trackers:
    """Rank 0's trackers of one run. ``samples_seen`` is the x-axis; a resumed run continues the same curve."""

    def __init__(
        self, names: Sequence[str], run_dir: Path, project: str, recipe: dict[str, Any], samples_seen: int
    ) -> None:
        self._trackers: dict[str, Any] = {}
        if not names:
            return
        _start_accelerate()
        for name in names:
            self._trackers[name] = tracker = _make(name, run_dir, project, samples_seen)
            tracker.start()
            if name == "tensorboard":  # its hparams table would create another directory at every start
                tracker.log({"recipe": "    " + yaml.safe_dump(recipe).replace("\n", "\n    ")}, step=samples_seen)
            elif name == "mlflow":
                _remember_mlflow(tracker, run_dir, recipe)
            else:
                tracker.store_init_configuration(flat(recipe))

    def log(self, values: dict[str, Any], samples_seen: int) -> None:
        """Logs ``values``; nested names are joined by ``/``, and values that are not finite numbers are skipped."""
        numbers = {
            key: value for key, value in flat(values).items() if isinstance(value, int | float) and value == value
        }
        for tracker in self._trackers.values():
            tracker.log(numbers, step=samples_seen)

    def close(self) -> None:
        for tracker in self._trackers.values():
            tracker.finish()


def _make(name: str, run_dir: Path, project: str, samples_seen: int) -> Any:
    from accelerate import tracking  # slow to import

    if name == "tensorboard":
        # purge_step hides values after the ``samples_seen`` that the run resumes from.
        return tracking.TensorBoardTracker("tensorboard", logging_dir=run_dir, purge_step=samples_seen + 1)
    if name == "wandb":
        where = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[
            :12
        ]  # a directory of the same name elsewhere is another run
        return tracking.WandBTracker(
            project, name=run_dir.name, id=f"{run_dir.name}-{where}", dir=str(run_dir), resume="allow"
        )
    if name == "trackio":
        return tracking.TrackioTracker(project, name=run_dir.name, resume="allow")
    assert name == "mlflow"
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
    begun = run_dir / MLFLOW_RUN
    return tracking.MLflowTracker(
        project, run_name=run_dir.name, run_id=begun.read_text().strip() if begun.is_file() else None
    )


def _remember_mlflow(tracker: Any, run_dir: Path, recipe: dict[str, Any]) -> None:
    """MLflow resumes a run by its own id, and does not accept a run's settings twice."""
    begun = run_dir / MLFLOW_RUN
    if not begun.is_file():
        tracker.store_init_configuration(flat(recipe))
        begun.write_text(tracker.tracker.info.run_id + "\n")


def _start_accelerate() -> None:
    """accelerate's trackers need its state, which changes the number of threads on CPUs: this restores it."""
    from accelerate import PartialState

    threads = torch.get_num_threads()
    PartialState()
    torch.set_num_threads(threads)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"eval": {"r1": 0.5}}`` -> ``{"eval/r1": 0.5}``."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str | None) else str(value)
    return result
