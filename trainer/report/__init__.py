"""Writes one self-contained HTML page about a run: its results, its curves, and example images with captions. For
several runs: overlaid curves, results side by side and the differences of their recipes.

    python -m trainer.report runs/quickstart                # -> runs/quickstart/report.html
    python -m trainer.report runs/a runs/b runs/c           # -> runs/comparison.html

It reads log.jsonl, evaluation.json, gallery.json, recipe.yaml, deepspeed.json and environment.json in the run's
directory, and plan.svg if `python -m trainer.plan ... --out RUN/plan.svg` wrote one. The page says which of them are
missing. The run may still be in progress.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.io.files import write_atomic
from data_tools.io.formatting import distinct_ends
from trainer.core.settings import check_out
from trainer.core.types import UserError
from trainer.report.curves import read_log
from trainer.report.page import Facts, render
from trainer.report.run_state import read_state


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory; several are compared")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write the page (default: RUN/report.html; of several, comparison.html beside the first)",
    )
    options = parser.parse_args(argv)
    check_out(options.out)
    first, *others = options.runs
    if others:
        out = write_comparison(options.runs, options.out or first.resolve().parent / "comparison.html")
    else:
        out = write_report(first, options.out or first / "report.html")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, one file; open it in a browser")
    return 0


def write_report(run: Path, out: Path) -> Path:
    """Writes the page about the run in directory ``run``. Raises UserError where there is neither a log nor an
    evaluation."""
    return _write(out, render(read_facts(run)))


def write_comparison(runs: list[Path], out: Path) -> Path:
    """Writes the page that compares several runs. Raises UserError as ``write_report`` does, and for too many runs."""
    from trainer.report.compare import MOST_RUNS, render_comparison  # slow: imports all settings

    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: at most {MOST_RUNS} can be compared; name fewer")
    names = distinct_ends([str(run.resolve()) for run in runs])
    facts = [replace(read_facts(run), name=name) for run, name in zip(runs, names, strict=True)]
    return _write(out, render_comparison(facts, [read_state(run) for run in runs]))


def read_facts(run: Path) -> Facts:
    """What lies in a run's directory. Raises UserError where there is neither a log nor an evaluation."""
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; name the directory of a run")
    if not (run / "log.jsonl").is_file() and not (run / "evaluation.json").is_file():
        raise UserError(
            f"{run}: neither log.jsonl nor evaluation.json is there: nothing to report; name the directory of a run"
        )
    return Facts(
        name=run.resolve().name,
        log=read_log(run / "log.jsonl"),
        evaluation=_json(run / "evaluation.json"),
        gallery=_json(run / "gallery.json"),
        environment=_json(run / "environment.json"),
        recipe=_text(run / "recipe.yaml"),
        deepspeed=_text(run / "deepspeed.json"),
        plan=_text(run / "plan.svg"),
        directory=str(run),
    )


def _write(out: Path, page: str) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    return out


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
    except ValueError as error:
        raise UserError(
            f"{path}: not readable ({error}); remove it, or rewrite it with `python -m trainer.evaluate`"
        ) from None
    return found
