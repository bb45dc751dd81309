"""What a run's evaluations have found so far: the base's scores, the best, and how long ago that was.

    history = read_history(run.directory, run.samples_seen, recipe.checkpoint.best)
    history.add(samples_seen, metrics)
    history.below_base(metrics), history.improved, history.since_best

It is read from log.jsonl, so that a resumed run, on any number of ranks, decides as one that never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.core.collectives import on_main
from trainer.core.types import UserError

LOG = "log.jsonl"


class History:
    """The evaluations of a run, oldest first; ``names`` are the metrics whose mean says which is the best."""

    def __init__(self, records: Sequence[tuple[int, dict[str, float]]] = (), names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.records: list[tuple[int, dict[str, float]]] = []
        self.best: tuple[int, float] | None = None
        """``samples_seen`` and score of the best so far; of equal ones the first."""
        self.since_best = 0
        """Evaluations after it."""
        self.improved = False
        """Whether the last evaluation is the best."""
        for samples_seen, metrics in records:
            self.add(samples_seen, metrics)

    def add(self, samples_seen: int, metrics: dict[str, float]) -> None:
        """Takes in an evaluation. Raises UserError for a name in ``checkpoint.best`` that it has not measured."""
        self.records.append((samples_seen, metrics))
        if not self.names:
            return
        score = self.score(metrics)
        self.improved = self.best is None or score > self.best[1]
        self.since_best = 0 if self.improved else self.since_best + 1
        if self.improved:
            self.best = samples_seen, score

    def score(self, metrics: dict[str, float]) -> float:
        """What `checkpoint.best` judges by, higher being better; what is not a number is worst."""
        missing = [name for name in self.names if name not in metrics]
        if missing:
            raise UserError(f"checkpoint.best: no metric {missing[0]!r} is measured here; known: {', '.join(metrics)}")
        values = [metrics[name] for name in self.names]
        return sum(values) / len(values) if all(value == value for value in values) else float("-inf")

    def at(self, samples_seen: int) -> bool:
        """Whether there is an evaluation at that ``samples_seen``."""
        return any(place == samples_seen for place, _ in self.records)

    def below_base(self, metrics: dict[str, float]) -> list[str]:
        """The recalls and accuracies at 1 that lie below those of the first evaluation, "NAME 31.2 -> 29.0" each."""
        base = self.records[0][1] if self.records else {}
        return [
            f"{name} {100 * base[name]:.1f} -> {100 * value:.1f}"
            for name, value in metrics.items()
            if name.endswith(("_r1", "_top1")) and name in base and round(1000 * value) < round(1000 * base[name])
        ]


def read_history(run_dir: Path, samples_seen: int, names: Sequence[str] = ()) -> History:
    """The evaluations in a run's log up to ``samples_seen``, on every rank."""

    def read() -> dict[str, Any]:
        path = run_dir / LOG
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        return {"records": [found for line in lines if (found := _evaluation(line, samples_seen)) is not None]}

    records = on_main(read)["records"]
    return History([(place, metrics) for place, metrics in records], names)


def _evaluation(line: str, samples_seen: int) -> tuple[int, dict[str, float]] | None:
    try:
        record = json.loads(line)
    except ValueError:  # a line cut short by a crash
        return None
    found = record.get("eval") if isinstance(record, dict) else None
    if not found or record["samples_seen"] > samples_seen:
        return None
    return record["samples_seen"], {name: float("nan") if x is None else x for name, x in found.items()}
