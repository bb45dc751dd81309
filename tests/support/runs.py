"""What tests of whole training runs share: shards to read, the command as a rank calls it, and what a run has written
down.

shards = make_shards(tmp_path / "pairs", tiny_captions(80))
run_ranks(call, 2, recipe, "run.samples=32")
curve(run)                                     # [(samples seen, loss, gradient norm), ...]
"""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (imported once here: every forked rank would import it)
import numpy as np
import pytest
from PIL import Image

from data_tools.commands import shard
from trainer import run, train
from trainer.core.types import UserError

PLAIN = ["model.config.vision_config.attention_dropout=0", "model.config.text_config.attention_dropout=0"]


def make_shards(folder: Path, captions: list[str]) -> Path:
    """PNGs of noise with captions, through the real sharding tool."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number, caption in enumerate(captions):
            Image.fromarray(dice.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            table.writerow([f"{number}.png", caption])
    out = folder / "shards"
    options = [
        "--image",
        "image",
        "--caption",
        "caption",
        "--shard-size",
        "30",
        "--processes",
        "1",
        "--max-rejected",
        "1",
        "--quiet",
    ]
    assert shard.main([str(folder / "pairs.csv"), str(out), *options]) == 0
    return out


def call(recipe: Path, *overrides: str) -> int:
    """What a rank does: the command's own main."""
    return train.main([str(recipe), *overrides])


def steps(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def curve(directory: Path) -> list[tuple[int, float, float]]:
    return [(line["samples_seen"], line["loss"], line["grad_norm"]) for line in steps(directory)]


def stopped_at_step(number: int, recipe: Path, *overrides: str) -> int:
    """Rank 1 gets the signal that queues send before they take a machine away."""
    real, count = run.train_step, iter(range(1, 1000))

    def step(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if next(count) == number and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGUSR1)
        return result

    run.train_step = step
    return call(recipe, *overrides)


def mistake(recipe: Path, *overrides: str) -> str:
    """The text of the UserError that a run ends in."""
    with pytest.raises(UserError) as raised:
        call(recipe, *overrides)
    return str(raised.value)
