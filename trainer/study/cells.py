"""The runs of a study: which there are, what each is, and running them side by side.

A run lies in runs/CONTESTANT@LABEL-sSEED-DIGEST, where the digest is of all keys of its recipe: no two runs share a
directory, and one whose recipe was changed is another run. ``result.json`` is written last and marks a finished one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from data_tools.io.files import write_atomic
from data_tools.io.formatting import duration
from trainer.config import Recipe, dump, load
from trainer.core.distributed import cores
from trainer.core.types import UserError
from trainer.finetune.sweep import command
from trainer.report.curves import read_log
from trainer.study.settings import Overrides, StudySettings

logger = logging.getLogger(__name__)

TRIAL_SEED = 1000
"""Seed of the runs that only choose a rate: none of those that count."""
POLL = 0.2


@dataclass(frozen=True)
class Job:
    """One run: a cell of the grid with a seed and a rate."""

    contestant: str
    label: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return self.recipe.run.directory.parent

    @property
    def title(self) -> str:
        what = "" if self.seed != TRIAL_SEED else f", trying rate {self.recipe.optim.lr:g}"
        return f"{self.contestant} @ {self.label}" + (what or f", seed {self.seed}")

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run has found, if it has finished."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class Bench:
    """Where a study lies, and what its runs are made of."""

    study: StudySettings
    out: Path
    data: str
    """Folder of shards, which {data} stands for."""
    always: tuple[str, ...] = ()
    """``section.key=value`` of all runs."""

    def job(self, contestant: str, label: str, seed: int, factor: float = 1.0) -> Job:
        """The run of a cell. Raises UserError for a key that the recipe does not have."""
        layers = (self.study.overrides, self.study.grid[label], self.study.contestants[contestant])
        keys: Overrides = {key: value for layer in layers for key, value in layer.items()} | {"run.seed": seed}
        assignments = [*self.always, *(f"{key}={self.text(value)}" for key, value in keys.items())]
        try:
            recipe = load(Path(self.study.recipe), assignments)
        except UserError as error:
            raise UserError("; ".join(f"{contestant} @ {label}: {line}" for line in str(error).split("\n"))) from None
        sections: dict[str, Any] = {
            "checkpoint": recipe.checkpoint.model_copy(update={"every": max(1, recipe.run.samples // 2), "best": ()})
        }
        if factor != 1:
            sections["optim"] = recipe.optim.model_copy(update={"lr": recipe.optim.peak * factor})
        recipe = recipe.model_copy(update=sections)
        digest = hashlib.sha256(dump(recipe).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w@.=+-]+", "_", f"{contestant}@{label}-s{seed}-{digest}")
        run = recipe.run.model_copy(update={"directory": self.out / "runs" / name / "run"})
        return Job(contestant, label, seed, recipe.model_copy(update={"run": run}))

    def text(self, value: Any) -> str:
        """A value as YAML in one line, with {out} and {data} filled in."""
        flow = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        return flow.replace("{out}", str(self.out)).replace("{data}", self.data)

    def prepare(self) -> None:
        """Runs the study's commands that have not run yet. Raises UserError where one fails."""
        for number, line in enumerate(self.study.prepare):
            text = line.replace("{out}", str(self.out)).replace("{data}", self.data)
            done = self.out / f"prepare-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            if (done / "done").is_file():
                continue
            done.mkdir(parents=True, exist_ok=True)
            logger.info(f"preparing {number + 1} of {len(self.study.prepare)}: {text}")
            with (done / "output.txt").open("w") as output:
                arguments = [sys.executable, "-m", *shlex.split(text)]
                code = subprocess.run(arguments, stdout=output, stderr=output, env=environment(None)).returncode
            if code:
                raise UserError(f"prepare: `{text}` ended with exit code {code}; see {done / 'output.txt'}")
            (done / "done").touch()

    def score(self, job: Job) -> float | None:
        """A finished run's first metric."""
        return None if job.result is None else job.result["metrics"][next(iter(self.study.metrics))]


def slots(jobs: int | None) -> list[str | None]:
    """Where runs go side by side: numbers of GPUs, or None for a core each."""
    gpus = torch.cuda.device_count()
    places: list[str | None] = [str(number) for number in range(gpus)[:jobs]]
    return places or [None] * (jobs or cores())


def environment(gpu: str | None) -> dict[str, str]:
    """Of one run: a GPU of its own, or one thread."""
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **own}


def run_all(
    jobs: Sequence[Job],
    metrics: dict[str, str | list[str]],
    places: list[str | None],
    deadline: float,
    finished: Callable[[], None],
) -> bool:
    """Runs those of ``jobs`` that have no result, as many at once as there are ``places``; calls ``finished`` after
    each. Returns False where ``deadline`` (of the monotonic clock) left some out. Raises UserError if one fails; the
    others are told to save first."""
    waiting = [job for job in jobs if job.result is None]
    free, seconds = list(places), list[float]()
    running: dict[subprocess.Popen[bytes], tuple[Job, str | None, float]] = {}
    try:
        while waiting or running:
            if time.monotonic() + (mean(seconds) if seconds else 0.0) > deadline:
                waiting = []
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                running[_start(job, place)] = (job, place, time.monotonic())
            time.sleep(POLL)
            for process in [process for process in running if process.poll() is not None]:
                job, place, start = running.pop(process)
                free.append(place)
                _keep(job, process.returncode, metrics)
                seconds.append(time.monotonic() - start)
                left = (len(waiting) + len(running)) * mean(seconds) / len(places)
                done = sum(job.result is not None for job in jobs)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in (job.result or {})["metrics"].items())
                logger.info(f"{done} of {len(jobs)}: {job.title}: {shown}; about {duration(left)} left")
                finished()
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
    return all(job.result is not None for job in jobs)


def _start(job: Job, place: str | None) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(job.folder / "recipe.yaml", dump(job.recipe))
    with (job.folder / "output.txt").open("ab") as output:
        arguments = command(job.folder / "recipe.yaml", 1)
        return subprocess.Popen(arguments, stdout=output, stderr=output, env=environment(place))


def _keep(job: Job, code: int, metrics: dict[str, str | list[str]]) -> None:
    """Writes the result of a run that has ended; its checkpoints are of no more use."""
    where = job.folder / "output.txt"
    if code:
        said = [line for line in where.read_text("utf-8", "replace").splitlines() if line.startswith("error: ")][-1:]
        why = f" ({said[0].removeprefix('error: ')})" if said else ""
        raise UserError(f"{job.title}: training ended with exit code {code}; see {where}{why}; start again to go on")
    log = read_log(job.recipe.run.directory / "log.jsonl")
    found = {}
    for name, keys in metrics.items():
        keys = [keys] if isinstance(keys, str) else keys
        missing = [key for key in keys if key not in log.last]
        if missing:
            raise UserError(f"metrics.{name}: {missing[0]!r} is not in the log; known: {', '.join(sorted(log.last))}")
        found[name] = mean(log.usual(key) if key == "pairs_per_second" else log.last[key] for key in keys)
    result = {"metrics": found, "rate": job.recipe.optim.peak, "advice": list(dict.fromkeys(log.advice))}
    write_atomic(job.folder / "result.json", json.dumps(result))
    shutil.rmtree(job.recipe.run.directory / "checkpoints", ignore_errors=True)


def at_best_rate(bench: Bench, job: Job) -> Job | None:
    """``job`` at the rate whose trial scored best; None while some trial has not finished."""
    scores = [(bench.score(trial), trial) for trial in trials(bench, job.contestant, job.label)]
    if any(score is None for score, _ in scores):
        return None
    if not scores:
        return job
    number = max(range(len(scores)), key=lambda n: scores[n][0] or 0.0)
    return bench.job(job.contestant, job.label, job.seed, bench.study.rates[number])


def trials(bench: Bench, contestant: str, label: str) -> list[Job]:
    """The short sweep of a cell: one run a rate."""
    return [bench.job(contestant, label, TRIAL_SEED, factor) for factor in bench.study.rates]
