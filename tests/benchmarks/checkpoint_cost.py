"""What a checkpoint costs: seconds to save, to save in the background (what training waits, and the rest), to verify
and to load; and the share of training time that one background checkpoint in ``--steps`` steps takes, waiting and
slower steps together.

    python -m tests.benchmarks.checkpoint_cost --millions 50 --ranks 2 --stage 1

A stack of square layers under AdamW on real ranks, its state 12 bytes a parameter; one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import nn

from tests.support.forked_ranks import run_ranks
from trainer.checkpoint import Checkpointer, CheckpointSettings, load, newest_good, save, verify

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
WIDTH = 1024


def engine_of(layers: int, stage: int) -> Any:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    train(engine, 1, 1)
    return SimpleNamespace(ds_engine=engine, module=engine.module, zero_stage=stage)


def train(engine: Any, steps: int, rows: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.randn(rows, WIDTH)).square().mean())
        engine.step()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return round(time.perf_counter() - begin, 3), result


def share(engine: Any, keeper: Checkpointer, steps: int, rows: int) -> dict[str, float]:
    """Training with a checkpoint at its beginning against training without, in turns; the median of three."""

    def saving(position: int) -> None:
        keeper.save(engine, position, {})
        train(engine.ds_engine, steps, rows)

    shares = []
    for turn in range(3):
        without, _ = timed(lambda: train(engine.ds_engine, steps, rows))
        saved, _ = timed(lambda turn=turn: saving(10 + turn))  # type: ignore[misc]
        keeper.wait()
        shares.append(1 - without / saved)
    return {"step": round(without / steps, 4), "of training time": round(statistics.median(shares), 4)}


def measure(layers: int, stage: int, run_dir: str, steps: int, rows: int) -> dict[str, Any]:
    engine, run = engine_of(layers, stage), Path(run_dir)
    saving, folder = timed(lambda: save(run, engine, 1, {}))
    keeper = Checkpointer(run, CheckpointSettings(asynchronous=True, keep=3))
    keeper.save(engine, 2, {})  # the first one also allocates
    keeper.wait()
    waiting, _ = timed(lambda: keeper.save(engine, 3, {}))
    rest, _ = timed(keeper.wait)
    costs = share(engine, keeper, steps, rows)
    keeper.close()
    folder = newest_good(run) or folder
    verifying, _ = timed(lambda: verify(folder))
    loading, _ = timed(lambda: load(folder, engine))
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "gigabytes": round(size / 1e9, 3),
        "save": saving,
        "background": {"training waits": waiting, "the rest": rest},
        f"one in {steps} steps": costs,
        "verify": verifying,
        "verify and load": loading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=50, help="parameters")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50, help="from one background checkpoint to the next")
    parser.add_argument("--rows", type=int, default=64, help="a rank and step")
    options = parser.parse_args()
    layers = max(1, round(options.millions * 1e6 / WIDTH**2))
    with tempfile.TemporaryDirectory() as run_dir:
        print(
            json.dumps(
                vars(options)
                | run_ranks(
                    measure, options.ranks, layers, options.stage, run_dir, options.steps, options.rows, timeout=600.0
                )[0]
            )
        )


if __name__ == "__main__":
    main()
