"""A training run to which things happen (tests/faults.py): real ranks, forked from a warm parent, under a launcher
process that may be killed as well.

    python -m tests.chaos --faults 108 --seed 3       # a line a fault, and the longest time to the exit of all ranks

Every rank writes down which samples each of its steps takes. After each fault the ranks must end by themselves, within
LIMIT seconds; then the run is started again on another number of ranks and at another ZeRO stage, and its curve and its
samples are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (imported once here: every forked rank would import it)
import numpy as np
import psutil
import yaml

from data_tools.io.errors import run_command
from tests.faults import AT_ONCE, FAULTS, Fault, overrides, plan
from tests.support.clusters import free_port
from tests.support.runs import curve, make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer import train
from trainer.checkpoint import tensor_file
from trainer.core.types import Batch

LIMIT = 30.0
"""Seconds from a fault to the exit of all ranks."""
STEPS_A_FAULT = 6
SPARE_STEPS = 60  # a fast run must not finish before its last fault
STAGES = ("zero0", "zero1", "zero2", "zero3")
SIZE = 16
ROOM = 24 * 2**20
"""Bytes of the file system that gets full: some checkpoints of the tiny model."""
MOST = 240.0
"""Seconds without progress after which a start has failed: nothing here takes a tenth of it, but machines are
shared."""


def recipe_in(folder: Path, steps: int) -> Path:
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "whole"), "samples": steps * SIZE},
        "model": {"config": tiny_config(layers=1), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(make_shards(folder / "pairs", tiny_captions(60))), "workers": 0},
        "batch": {"size": SIZE, "micro_batch": 4},
        "optim": {"lr": 1e-3, "eps": 1e-4},
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000, "trackers": "none"},
        "checkpoint": {"every": 2 * SIZE, "keep": 3},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _rank(rank: int, world: int, port: int, arguments: list[str], seen: Path, output: Path) -> None:
    """The life of a rank, ``python -m trainer.train`` in all but the imports; never returns."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    step, write = train.Run.step, tensor_file.DigestFile.write

    def noted(self: train.Run, batch: Batch, **keys: Any) -> Any:
        with (seen / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps([self.samples_seen, rank, world, batch.ids.tolist()]) + "\n")
        return step(self, batch, **keys)

    def slow(self: Any, data: Any) -> None:
        time.sleep(0.002)  # else a fault would hardly ever meet a checkpoint that is being written
        write(self, data)

    train.Run.step, tensor_file.DigestFile.write = noted, slow  # type: ignore[method-assign]
    sys.argv = ["trainer.train", *arguments]
    try:
        os._exit(run_command(train.main, arguments))
    except SystemExit as end:  # stopped by a signal: EXIT_AGAIN
        os._exit(int(end.code or 0))
    finally:
        os._exit(1)


class Start:
    """A launcher process and its ranks."""

    def __init__(self, world: int, arguments: list[str], seen: Path, output: Path, port: int | None = None) -> None:
        self.world, self.seen, self.ended = world, seen, False
        reading, writing = os.pipe()
        port = port or free_port()
        self.launcher = os.fork()
        if self.launcher == 0:
            ranks = []
            for rank in range(world):
                ranks.append(os.fork())
                if ranks[-1] == 0:
                    os.close(writing)
                    _rank(rank, world, port, arguments, seen, output)
            os.write(writing, json.dumps(ranks).encode())
            os.close(writing)
            codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
            os._exit(max(abs(code) for code in codes))
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            self.ranks: list[int] = json.loads(file.read())

    def alive(self) -> list[int]:
        """Ranks that have not ended (a zombie has ended)."""
        found = []
        for pid in self.ranks:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self) -> float:
        """Waits until every rank has ended by itself; the seconds it took."""
        began = time.monotonic()
        while self.alive():
            if time.monotonic() - began > LIMIT:
                left = [self.ranks.index(pid) for pid in self.alive()]
                self.kill()
                raise AssertionError(f"ranks {left} of {self.world} are still there {LIMIT} s after the fault")
            time.sleep(0.02)
        seconds = time.monotonic() - began
        if not self.ended:
            os.waitpid(self.launcher, 0)
            self.ended = True
        return seconds

    def kill(self) -> None:
        for pid in [*self.alive(), self.launcher]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


class Chaos:
    """The run, its faults, and what an undisturbed one did."""

    def __init__(self, folder: Path, faults: int, seed: int, disk: Path | None) -> None:
        self.folder, self.dice, self.disk = folder, random.Random(seed), disk
        self.faults, self.steps = faults, STEPS_A_FAULT * faults + SPARE_STEPS
        self.recipe = recipe_in(folder, self.steps)
        self.stages: list[str] = []
        for stage in STAGES:  # nothing is too small to be partitioned
            zero = {"stage": int(stage[-1]), **({"stage3_param_persistence_threshold": 0} if stage == "zero3" else {})}
            (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
        self.directory, self.shards = (disk or folder) / "run", folder / "pairs"
        self.extra: list[str] = []
        """Overrides of all later starts."""
        self.after: Callable[[], None] | None = None
        """What a fault leaves to be done when the ranks have ended."""
        self.output = folder / "output"
        self.longest = 0.0
        self.expected, self.order = self._undisturbed()

    def _undisturbed(self) -> tuple[dict[int, float], dict[int, list[int]]]:
        seen = self._folder("seen-whole")
        start = Start(2, [str(self.recipe)], seen, self.output)
        self.until(start, lambda: not start.alive())
        start.end()
        losses = {samples: loss for samples, loss, _ in curve(self.folder / "whole")}
        order: dict[int, list[int]] = {}
        for at, _, _, ids in sorted(self._seen(seen)):
            order.setdefault(at, []).extend(ids)
        assert len(losses) == len(order) == self.steps, self.output.read_text()
        return losses, order

    def _folder(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def _seen(self, folder: Path) -> Iterator[tuple[int, int, int, list[int]]]:
        for path in folder.iterdir():
            yield from self._lines(path)

    def _lines(self, path: Path) -> Iterator[tuple[int, int, int, list[int]]]:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a killed rank may leave half a line
                yield tuple(json.loads(line))

    def until(self, start: Start, reached: Callable[[], bool]) -> None:
        """Waits; fails when the ranks end too early, or when none has made a step for MOST seconds."""
        at, since = -1, time.monotonic()
        while not reached():
            if not start.alive() and not reached():
                raise AssertionError(f"the ranks ended too early:\n{self.output.read_text()[-4000:]}")
            if time.monotonic() - since > MOST / 4 and self._at(start) > at:
                at, since = self._at(start), time.monotonic()
            if time.monotonic() - since > MOST:
                start.kill()
                raise AssertionError(f"no progress:\n{self.output.read_text()[-4000:]}")
            time.sleep(0.005)

    def check(self, whole: bool = False) -> None:
        """Nothing that was learnt or read may differ from the undisturbed run."""
        found = curve(self.directory) if (self.directory / "log.jsonl").exists() else []
        positions = [samples for samples, _, _ in found]
        # From the first step on, none missing, none twice.
        assert positions == sorted(self.expected)[: len(positions)]
        np.testing.assert_allclose(
            [loss for _, loss, _ in found], [self.expected[samples] for samples in positions], rtol=2e-4
        )
        taken: dict[int, set[int]] = {}
        for at, rank, world, ids in self._seen(self._folder("seen")):
            rows = SIZE // world
            assert ids == self.order[at][rank * rows : (rank + 1) * rows], (at, rank, world)
            taken.setdefault(at, set()).update(range(rank * rows, (rank + 1) * rows))
        if whole:
            assert positions == sorted(self.expected)
            assert sorted(taken) == sorted(self.order)
            assert all(rows == set(range(SIZE)) for rows in taken.values())

    def go(self, say: Callable[[str], None], kinds: list[Fault] = FAULTS) -> None:
        """All faults, one a start; then to the end."""
        for number, fault in enumerate(plan(self.dice, self.faults, self.disk is not None, kinds)):
            start = self.start(overrides(fault, self.shards / "shards"))
            step = STEPS_A_FAULT * number + self.dice.randint(2, STEPS_A_FAULT)
            if fault not in AT_ONCE:
                self.until(start, lambda start=start, step=step: self._at(start) >= step * SIZE)  # type: ignore[misc]
                time.sleep(self.dice.uniform(0, 0.1))
            self.after = None
            fault(self, start)
            seconds = start.end()
            if self.after is not None:
                self.after()
            self.longest = max(self.longest, seconds)
            where = f"{start.world} rank(s), {self.stage}, step {step:4d}"
            say(f"{number + 1:3d} {fault.__name__:24} {where}: all ended after {seconds:5.2f} s")
            self.check()
        start = self.start()
        self.until(start, lambda: not start.alive())
        start.end()
        self.check(whole=True)

    def start(self, more: Sequence[str] = (), world: int | None = None, port: int | None = None) -> Start:
        """The same command again, on another number of ranks and at another ZeRO stage."""
        if not self.stages:  # each before any comes again
            self.stages = self.dice.sample(STAGES, len(STAGES))
        self.stage = self.stages.pop()
        arguments = [
            str(self.recipe),
            f"run.directory={self.directory}",
            f"checkpoint.asynchronous={self.dice.random() < 0.5}",
            f"engine.ds_config={self.folder / self.stage}.json",
            *self.extra,
            *more,
        ]
        return Start(world or self.dice.choice([1, 2, 4]), arguments, self._folder("seen"), self.output, port)

    def makes_steps(self, start: Start, steps: int) -> None:
        """Waits for some more steps, or for the last but one."""
        goal = min(self._at(start) + steps * SIZE, (self.steps - 1) * SIZE)
        self.until(start, lambda: self._at(start) >= goal)

    def _at(self, start: Start) -> int:
        """The position that a start has reached."""
        paths = [start.seen / f"{pid}.jsonl" for pid in start.ranks]
        return max((at for path in paths if path.exists() for at, *_ in self._lines(path)), default=0)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of ROOM bytes; None where this user may not mount one."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "ringlip-test", str(folder)], capture_output=True
    ).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=108)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk") as disk:
        if disk is None:
            print("no tmpfs may be mounted here (root may): the disk is never full")
        chaos = Chaos(Path(folder), options.faults, options.seed, disk)
        chaos.go(lambda line: print(line, flush=True))
    print(
        f"{options.faults} faults in {time.monotonic() - began:.0f} s, nothing lost; the longest end took "
        f"{chaos.longest:.2f} s"
    )


if __name__ == "__main__":
    main()
