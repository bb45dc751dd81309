"""Short runs at several rates, and the long one.

A rate is tried by a run of a thirtieth of the budget; from the usual one it is raised fivefold as long as that is
better. What counts is the gain on one's own data less what the general set loses beyond one point.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_tools.io.files import write_atomic
from trainer.core.types import UserError
from trainer.evals import read_history
from trainer.finetune.choose import Plan
from trainer.report.curves import read_log

FACTOR, TRIES = 5.0, 4
SHARE, FEWEST_STEPS = 30, 30
"""A trial's part of the budget, and the steps it has at least."""
LOSS = 0.01
"""What the general set may lose."""


@dataclass(frozen=True)
class Scores:
    """Means of the metrics that count, in [0, 1]."""

    own: float
    general: float | None

    @classmethod
    def of(cls, plan: Plan, metrics: dict[str, float]) -> Scores:
        """Those of ``plan`` in the metrics of an evaluation."""
        own, general = ([metrics[name] for name in names] for names in (plan.own, plan.general))
        return cls(sum(own) / len(own), sum(general) / len(general) if general else None)

    def lost(self, base: Scores) -> float:
        """What the general set has lost; 0 without one."""
        return 0.0 if self.general is None or base.general is None else base.general - self.general

    def gain(self, base: Scores) -> float:
        """On one's own data, less what was lost beyond LOSS."""
        return self.own - base.own - max(0.0, self.lost(base) - LOSS)


def sweep(plan: Plan, out: Path, minutes: float | None, gpus: int) -> None:
    """Sets ``optim.lr`` to the best that was tried, and the length of the run where it is to take ``minutes``."""
    size, usual = plan.tree["batch"]["size"], plan.tree["optim"]["lr"]
    samples = max(FEWEST_STEPS, plan.tree["run"]["samples"] // SHARE // size) * size
    tried: dict[float, float] = {}
    for number in range(TRIES):
        rate = usual * FACTOR**number
        folder = out / f"rate-{rate:g}"
        recipe = folder / "recipe.yaml"
        section = {"every": samples, "patience": 0}
        short = plan.recipe(
            run={"directory": str(folder / "run"), "samples": samples}, optim={"lr": rate}, eval=section
        ).model_dump(mode="json")
        short["checkpoint"] |= {"best": [], "every": 10**12}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe, yaml.safe_dump(short, sort_keys=False))
        train(recipe, folder / "run", gpus, quiet=True)
        before, after = (Scores.of(plan, read_history(folder / "run", 10**18).records[place][1]) for place in (0, -1))
        if not number:
            chance = "" if before.general is None else f"; general set {100 * before.general:.1f}"
            print(f"base: {100 * before.own:.1f}{chance}", file=sys.stderr, flush=True)
        tried[rate] = after.gain(before)
        lost = f", general set {-100 * after.lost(before):+.1f}" if plan.general else ""
        print(
            f"rate {rate:g}: {100 * (after.own - before.own):+.1f} after {samples:,} pairs{lost}",
            file=sys.stderr,
            flush=True,
        )
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        if tried[rate] < max(tried.values()):
            break
    best = max(tried, key=lambda rate: tried[rate])
    listed = ", ".join(f"{rate:g}: {100 * gain:+.1f}" for rate, gain in tried.items())
    plan.set("optim.lr", best, f"the best of short runs of {samples:,} pairs, by their gain: {listed}")
    if minutes is not None:
        _fit_time(plan, folder / "run", minutes)


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
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *ranks, "-m", "trainer.train", str(recipe)]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "output.txt").open("w") as output:
        code = subprocess.run(command, stderr=output if quiet else None, check=False).returncode
    if code:
        where = f"see {run / 'output.txt'}" if quiet else "see above"
        raise UserError(f"training ended with exit code {code}, {where}; the same command goes on from its checkpoints")
