"""Lists the runs in a folder with their state, progress, scores and speed.

    python -m trainer.runs                # the runs in runs/
    python -m trainer.runs FOLDER         # the runs in FOLDER and its subfolders

running: a job holds the run's lock. finished: all pairs were trained on. stopped: saved before the end. died: the log
goes beyond the last checkpoint. broken: the recipe or the log cannot be read; the reason is printed below the table.
Scores come from evaluation.json, or else from the last evaluation in the log. Exit codes: 0, 2 if there is no run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_tools.io.errors import run_command
from data_tools.io.formatting import duration
from trainer.core.types import UserError
from trainer.report.run_charts import headlines, words
from trainer.report.run_state import RunState, is_run, read_state

DEEPEST = 3
"""Levels of subfolders that are searched."""
MOST_SCORES = 3


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; name the folder that holds your run directories")
    found = [read_state(run) for run in find_runs(folder)]
    if not found:
        raise UserError(f"{folder}: no run in it (a run has a recipe.yaml and a log.jsonl); name another folder")
    print(table(found, folder, time.time()))
    return 0


def find_runs(folder: Path, deepest: int = DEEPEST) -> Iterator[Path]:
    """Run directories in ``folder`` (which may itself be one), by name. Unreadable folders are skipped."""
    if is_run(folder):
        yield folder
        return
    if deepest == 0 or not os.access(folder, os.R_OK | os.X_OK):
        return
    for inside in sorted(folder.iterdir()):
        if inside.is_dir() and not inside.is_symlink() and not inside.name.startswith("."):
            yield from find_runs(inside, deepest - 1)


def table(runs: list[RunState], folder: Path, now: float) -> str:
    """One line per run, then the notes."""
    fullest = sorted(runs, key=lambda run: -len(run.scores))  # it has the scores in the order of an evaluation
    scores = headlines(dict.fromkeys(name for run in fullest for name in run.scores), MOST_SCORES)
    head = [
        "run",
        "state",
        "pairs",
        "",
        "loss",
        *(words(name) for name in scores),
        "pairs/s",
        "trained",
        "last written",
    ]
    rows = [[_name(run, folder), *_cells(run, scores, now)] for run in runs]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    notes = [f"{_name(run, folder)}: {run.note}" for run in runs if run.note]
    return "\n".join([line.rstrip() for line in lines] + ([""] if notes else []) + notes)


def _cells(run: RunState, scores: list[str], now: float) -> list[str]:
    last = run.log.last
    return [
        run.state,
        f"{run.seen:,}" if run.seen else "",
        f"{100 * run.seen / run.total:.0f}%" if run.seen and run.total else "",
        f"{last['loss']:.4g}" if "loss" in last else "",
        *(f"{100 * run.scores[name]:.1f}%" if name in run.scores else "" for name in scores),
        f"{run.log.usual('pairs_per_second'):,.0f}" if "pairs_per_second" in run.log.columns else "",
        duration(last["seconds"]) if "seconds" in last else "",
        _age(run.folder, now),
    ]


def _name(run: RunState, folder: Path) -> str:
    return str(run.folder.relative_to(folder)) if run.folder != folder else run.folder.resolve().name


def _age(folder: Path, now: float) -> str:
    """Time since the log or the recipe was last written, such as "3 min ago"."""
    stamps = [(folder / name).stat().st_mtime for name in ("log.jsonl", "recipe.yaml") if (folder / name).is_file()]
    if not stamps:
        return ""
    seconds = max(0.0, now - max(stamps))
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
