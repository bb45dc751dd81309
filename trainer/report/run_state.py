"""Where a run stands, read from its directory: running, finished, stopped, died, not begun or broken."""

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

State = Literal["running", "finished", "stopped", "died", "not begun", "broken"]
CHECKPOINTS = "checkpoints/samples-*/checkpoint.json"
"""As trainer/checkpoint/store.py has it; importing that takes seconds, and a list of runs should be there at once."""
LEFT_BY_A_RUN = ("recipe.yaml", "log.jsonl", "checkpoints")


@dataclass(frozen=True)
class RunState:
    """One run directory. Every part may be missing."""

    folder: Path
    state: State
    note: str = ""
    """Why it is broken, or what to do where it has died."""
    log: Log = field(default_factory=Log)
    total: int = 0
    """Pairs at the end of the run; 0: unknown."""
    scores: dict[str, float] = field(default_factory=dict)
    """Recall and accuracy at 1: of evaluation.json, else the newest of the log."""

    @property
    def seen(self) -> int:
        """Pairs trained on so far, as far as the log goes."""
        return int(self.log.last.get("samples_seen", 0))


def is_run(folder: Path) -> bool:
    """Whether a run has written something here."""
    return any((folder / name).exists() for name in LEFT_BY_A_RUN)


def read_state(folder: Path) -> RunState:
    """Never raises for what a run may have left behind.

    Must not be called in the process that trains there: looking at its lock would release it (POSIX record locks).
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
        return "broken", f"{folder / 'recipe.yaml'}: not there; it says what the run is"
    positions = [path.parent.name.partition("-")[2] for path in folder.glob(CHECKPOINTS)]
    saved = max((int(position) for position in positions if position.isdecimal()), default=0)
    if not run.seen and not saved:
        return ("broken", "no line of log.jsonl can be read") if run.log.damaged else ("not begun", "")
    if run.total and run.seen >= run.total and (saved >= run.total or not saved):
        return "finished", ""
    if saved >= run.seen:
        return "stopped", "the same command goes on from here"
    where = f"the checkpoint at {saved:,}" if saved else "its beginning: there is no checkpoint"
    return "died", f"the same command goes on from {where}"


def _is_locked(path: Path) -> bool:
    """Whether a job holds a run's lock, on any machine that sees the directory. Of a directory that cannot be written
    to, nobody here can tell: it counts as free."""
    if not path.is_file():
        return False
    try:
        with FileLock(path, inherited=False) as lock:
            return not lock.acquire(timeout=0)
    except OSError:
        return False


def _total(recipe: dict[str, Any]) -> int:
    """Samples of whole global batches; 0 where the recipe does not say."""
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
        raise UserError(f"{path}: not readable ({error}); make it anew with `python -m trainer.evaluate`") from None
