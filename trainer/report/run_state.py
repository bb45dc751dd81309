"""The state of a run, read from its directory: running, finished, stopped, died, not started or broken."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.io.lock import FileLock
from trainer.core.settings import read_yaml
from trainer.core.types import UserError
from trainer.report.curves import Log, read_log
from trainer.report.run_charts import headlines

State = Literal["running", "finished", "stopped", "died", "not started", "broken"]
CHECKPOINTS = "checkpoints/samples-*/checkpoint.json"
"""The layout of trainer/checkpoint/store.py, which is not imported because that takes seconds."""
LEFT_BY_A_RUN = ("recipe.yaml", "log.jsonl", "checkpoints")


@dataclass(frozen=True)
class RunState:
    """The state of one run directory; any file may be missing."""

    folder: Path
    state: State
    note: str = ""
    """Why the run is broken, or where it resumes."""
    log: Log = field(default_factory=Log)
    total: int = 0
    """Pairs at the end of the run; 0 if unknown."""
    scores: dict[str, float] = field(default_factory=dict)
    """Recall and accuracy at 1, from evaluation.json or else from the last evaluation in the log."""

    @property
    def seen(self) -> int:
        """Pairs trained on so far, according to the log."""
        return int(self.log.last.get("samples_seen", 0))


def is_run(folder: Path) -> bool:
    """Whether the folder is a run directory."""
    return any((folder / name).exists() for name in LEFT_BY_A_RUN)


def read_state(folder: Path) -> RunState:
    """Damaged and missing files give a state, not an exception.

    Must not be called in the training process itself: closing the lock file would release the lock (POSIX locks).
    """
    running = _is_locked(folder / "lock")
    log = Log()
    try:
        log = read_log(folder / "log.jsonl")
        evaluation = _evaluation(folder)
        recipe = read_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
        total = _total(recipe)
    except (UserError, OSError) as error:
        return RunState(folder, "running" if running else "broken", str(error), log)
    known = evaluation or {
        name.removeprefix("eval."): value for name, value in log.last.items() if name.startswith("eval.")
    }
    found = RunState(folder, "running", "", log, total, {name: known[name] for name in headlines(known)})
    if running:
        return found
    state, note = _ended(found, folder, bool(recipe))
    return RunState(folder, state, note, log, total, found.scores)


def _ended(run: RunState, folder: Path, has_recipe: bool) -> tuple[State, str]:
    if not has_recipe:
        return "broken", f"{folder / 'recipe.yaml'}: no such file"
    positions = [path.parent.name.partition("-")[2] for path in folder.glob(CHECKPOINTS)]
    saved = max((int(position) for position in positions if position.isdecimal()), default=0)
    if not run.seen and not saved:
        return ("broken", "log.jsonl: no readable line") if run.log.damaged else ("not started", "")
    if run.total and run.seen >= run.total and (saved >= run.total or not saved):
        return "finished", ""
    if saved >= run.seen:
        return "stopped", "the same command resumes from here"
    where = f"resumes from the checkpoint at {saved:,}" if saved else "starts again: there is no checkpoint"
    return "died", f"the same command {where}"


def _is_locked(path: Path) -> bool:
    """Whether a job on any machine holds the run's lock. Without write permission this cannot be tested: then False."""
    if not path.is_file():
        return False
    try:
        with FileLock(path, inherited=False) as lock:
            return not lock.acquire(timeout=0)
    except OSError:
        return False


def _total(recipe: dict[str, Any]) -> int:
    """Pairs in whole global batches; 0 if the recipe does not say."""
    samples, size = ((recipe.get(section) or {}).get(key) for section, key in (("run", "samples"), ("batch", "size")))
    if not (isinstance(samples, int) and isinstance(size, int) and size > 0):
        return 0
    return math.ceil(samples / size) * size


def _evaluation(folder: Path) -> dict[str, float]:
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return {str(name): float(value) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not readable ({error}); rewrite it with `python -m trainer.evaluate`") from None
