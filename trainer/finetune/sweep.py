"""Short runs at several rates, and the long one.

A rate is tried by a run of a thirtieth of the budget; from the usual one it is raised fivefold, until that spoils what
the base can do on these data. What counts is the gain on one's own data of what would be exported: mixed with the base
as far as needed to lose at most a point of the general set.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from data_tools.io.files import write_atomic
from trainer import checkpoint
from trainer.config import dump, load
from trainer.core.types import UserError
from trainer.evals import read_history
from trainer.finetune.choose import Plan
from trainer.finetune.mix import LOSS, Scores, base_of, mix, tuned_of
from trainer.report.curves import read_log

logger = logging.getLogger(__name__)

FACTOR, TRIES = 5.0, 4
SPOILT = 0.05
"""A fall on one's own data from which on higher rates are not tried."""
FEW_SHARES = (0.6, 0.3, 0.1)
SHARE, FEWEST_STEPS = 30, 30
"""A trial's part of the budget, and the steps it has at least."""


def sweep(plan: Plan, path: str, out: Path, minutes: float | None, gpus: int) -> None:
    """Sets ``optim.lr`` to the best that was tried, and the length of the run where it is to take ``minutes``."""
    size, usual = plan.tree["batch"]["size"], plan.tree["optim"]["lr"]
    samples = max(FEWEST_STEPS, plan.tree["run"]["samples"] // SHARE // size) * size
    gains: dict[float, float] = {}
    for number in range(TRIES):
        rate = usual * FACTOR**number
        run = _try(plan, rate, samples, out / f"rate-{rate:g}", gpus)
        before, after = (Scores.of(plan, read_history(run, 10**18).records[place][1]) for place in (0, -1))
        share, spoilt = 1.0, after.own < before.own - SPOILT
        if after.lost(before) > LOSS:
            after, share = _mixed(plan, path, run, before)
        gains[rate] = after.own - before.own
        if not number:
            logger.info("base: " + before.words())
        logger.info(
            f"rate {rate:g}: {after.words()} after {samples:,} pairs"
            + (f", {share:g} of the way from the base" if share < 1 else "")
        )
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        if spoilt:
            break
    best = max(gains, key=lambda rate: gains[rate])
    listed = ", ".join(f"{rate:g}: {100 * gain:+.1f}" for rate, gain in gains.items())
    plan.set("optim.lr", best, f"the best of short runs of {samples:,} pairs, by their gain: {listed}")
    if minutes is not None:
        _fit_time(plan, run, minutes)


def _try(plan: Plan, rate: float, samples: int, folder: Path, gpus: int) -> Path:
    """A short run at ``rate``; its directory."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = plan.recipe(
        run={"directory": str(folder / "run"), "samples": samples},
        optim={"lr": rate},
        eval={"every": samples, "patience": 0},
        checkpoint={"best": [], "every": samples},
    )
    write_atomic(folder / "recipe.yaml", dump(recipe))
    train(folder / "recipe.yaml", folder / "run", gpus, quiet=True)
    return folder / "run"


def _mixed(plan: Plan, path: str, run: Path, before: Scores) -> tuple[Scores, float]:
    """What the run is worth mixed with the base as far as needed, and the share of it."""
    recipe = load(run / "recipe.yaml")
    tuned = tuned_of(recipe, path, checkpoint.find(run))
    share, _, found = mix(plan, base_of(recipe, path), tuned, recipe, before, FEW_SHARES)
    return Scores.of(plan, found.metrics), share


def _fit_time(plan: Plan, run: Path, minutes: float) -> None:
    """Fewer pairs, where the run would take longer than ``minutes`` at the speed of the last trial."""
    speed = read_log(run / "log.jsonl").last.get("pairs_per_second")
    size, asked = plan.tree["batch"]["size"], plan.tree["run"]["samples"]
    fits = int(60 * minutes * speed) // size * size if speed else asked
    if fits < asked:
        plan.set("run.samples", max(size, fits), f"{minutes:g} minutes at {speed:.0f} pairs a second")
        every = max(1, fits // 10 // size) * size
        plan.tree["eval"]["every"] = plan.tree["checkpoint"]["every"] = every


def train(recipe: Path, run: Path, gpus: int, quiet: bool = False) -> None:
    """The training command on all GPUs of this machine, in processes of its own. Raises UserError where it fails."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "output.txt").open("w") as output:
        code = subprocess.run(command(recipe, gpus), stderr=output if quiet else None, check=False).returncode
    if code:
        where = f"see {run / 'output.txt'}" if quiet else "see above"
        raise UserError(f"training ended with exit code {code}, {where}; the same command resumes from its checkpoints")


def command(recipe: Path, gpus: int) -> list[str]:
    """The command line that trains ``recipe``, a rank a GPU."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    return [sys.executable, *ranks, "-m", "trainer.train", str(recipe)]
