"""Repeats a paper's finding as a grid of short training runs, and says whether it is the same here.

    python -m trainer.study batch                                  # a study of trainer/recipes/studies
    python -m trainer.study noise --budget 30 --seeds 3            # no new run after 30 minutes; start again to go on
    python -m trainer.study batch --data shards --recipe my.yaml   # on your data: shards/train, shards/validation
    python -m trainer.study mine.yaml                              # a study of your own

Each run is `trainer.train` in a process and a directory of its own, one a GPU, or one a core. Finished runs are kept,
stopped ones resume: the same command goes on, and ends with the same study.json. OUT holds study.json, a picture a
metric (.svg) and study.html: the paper's finding, ours, the same sign or not, and why.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from data_tools.io.errors import run_command
from data_tools.io.files import write_atomic
from data_tools.io.lock import FileLock
from trainer.core.logs import to_the_terminal
from trainer.core.types import UserError
from trainer.study.cells import Bench, Job, at_best_rate, run_all, slots, trials
from trainer.study.page import page, picture
from trainer.study.settings import StudySettings, load_study
from trainer.study.verdict import Cell, judge_all, summary

logger = logging.getLogger("trainer.study")  # not __name__, which is __main__ here

GLYPHS = "demo/shards"
"""Where launch/quickstart.sh keeps the pairs of the recipe `glyphs`, and the study makes them."""
MAKE_GLYPHS = (
    "data_tools glyphs demo/pairs",
    "data_tools shard demo/pairs/train.csv demo/shards/train --image image --caption caption",
    "data_tools shard demo/pairs/validation.csv demo/shards/validation --image image --caption caption",
    "data_tools shard demo/pairs/test.csv demo/shards/test --image image --caption caption",
    "data_tools vocabulary demo/shards/train demo/tokenizer",
)


def main(argv: list[str]) -> int:
    options = _options(argv)
    to_the_terminal()
    name, study = load_study(options.study)
    changed = {key: value for key in ("seeds", "recipe") if (value := getattr(options, key)) is not None}
    if study.recipe == "glyphs" and options.recipe is None and options.data is None and not Path(GLYPHS).is_dir():
        changed["prepare"] = [*MAKE_GLYPHS, *study.prepare]
    study = study.model_copy(update=changed)
    out = (options.out or Path("runs") / f"study-{name}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = options.data or GLYPHS
    always = () if options.data is None else (f"data.train={data}/train", f"data.validation={data}/validation")
    bench = Bench(study, out, data, (*always, *options.overrides))
    seeds = range(study.seeds)
    firsts = [bench.job(*cell, seed) for seed in seeds for cell in cells(study)]  # a mistake is told before any run
    deadline = math.inf if options.budget is None else time.monotonic() + 60 * options.budget
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are told to save
    with FileLock(out / "lock") as lock:
        if not lock.acquire(0):
            raise UserError(f"{out}: this study is running already; stop it, or give another --out")
        bench.prepare()
        command = "python -m trainer.study " + shlex.join(argv)

        def write() -> None:
            _write(name, bench, firsts, command)

        places = slots(options.jobs)
        sweep = [trial for cell in cells(study) for trial in trials(bench, *cell)]
        tuned = run_all(sweep, study.metrics, places, deadline, lambda: None)
        jobs = [job for first in firsts if (job := at_best_rate(bench, first)) is not None]
        complete = run_all(jobs, study.metrics, places, deadline, write) and tuned
        write()
    found = json.loads((out / "study.json").read_text(encoding="utf-8"))
    print(f"{name}: {found['verdict']}; {out / 'study.html'}")
    if not complete:
        print("the budget is spent; the same command goes on")
    return 0


def cells(study: StudySettings) -> list[Cell]:
    """All of a study, contestant by contestant in each column."""
    return [(contestant, label) for label in study.grid for contestant in study.contestants]


def _write(name: str, bench: Bench, firsts: list[Job], command: str) -> None:
    """study.json, pictures and page, of what has run so far; nothing in study.json depends on when."""
    study = bench.study
    jobs = [at_best_rate(bench, first) for first in firsts]
    done = [(job, job.result) for job in jobs if job is not None and job.result is not None]
    scores: dict[str, dict[Cell, list[float]]] = {metric: {} for metric in study.metrics}
    for job, result in done:
        for metric in study.metrics:
            scores[metric].setdefault((job.contestant, job.label), []).append(result["metrics"][metric])
    shown = {metric: {cell: summary(values) for cell, values in found.items()} for metric, found in scores.items()}
    verdict, claims = judge_all(study, scores)
    found: dict[str, Any] = {
        "study": name,
        "paper": study.paper,
        "found": study.found,
        "verdict": verdict,
        "claims": claims,
        "runs": {"finished": len(done), "all": len(firsts)},
        "cells": [
            {"contestant": job.contestant, "label": job.label, "seed": job.seed, **result} for job, result in done
        ],
        "advice": sorted({f"{job.contestant} @ {job.label}: {text}" for job, one in done for text in one["advice"]}),
    }
    write_atomic(bench.out / "study.json", json.dumps(found, ensure_ascii=False, indent=1))
    for metric, summaries in shown.items():
        if summaries:
            stem = "".join(letter if letter.isalnum() else "_" for letter in metric)
            write_atomic(bench.out / f"{stem}.svg", picture(metric, study, summaries))
    write_atomic(bench.out / "study.html", page(name, study, found, shown, command))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="NAME", help="a shipped study, or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="of all runs; the study's keys win"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory (default runs/study-NAME)")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no run that would end later")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each cell (default: the study's)")
    parser.add_argument("--data", metavar="SHARDS", help="folder with train and validation shards of your own")
    parser.add_argument("--recipe", metavar="FILE", help="your recipe, instead of the study's")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one a GPU, or one a core)")
    options = parser.parse_intermixed_args(argv)
    for name in ("budget", "seeds", "jobs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value:g} must be above 0, or left out")
    return options


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
