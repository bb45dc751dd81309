"""A real run: the quickstart's recipe on the quickstart's pairs, by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.gpu.checks import Check, Measured
from tests.support.runs import make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer

GLYPHS = "trainer/recipes/glyphs.yaml"


def command(*arguments: str, limit: float = 180) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments], capture_output=True, text=True, timeout=limit
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()[-300:]}")


def logged(run: Path) -> tuple[list[float], dict[str, float]]:
    """The losses, and the last evaluation."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluations = [line["eval"] for line in lines if "eval" in line]
    return [line["loss"] for line in lines if "loss" in line], evaluations[-1] if evaluations else {}


def quickstart(overrides: Sequence[str]) -> Measured:
    """The whole recipe on this one card."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "demo", Path(folder) / "run"
        command("data_tools", "glyphs", str(data / "pairs"))
        for part in ("train", "validation"):
            pairs, shards = data / "pairs" / f"{part}.csv", data / "shards" / part
            command("data_tools", "shard", str(pairs), str(shards), "--image", "image", "--caption", "caption")
        command("data_tools", "vocabulary", str(data / "shards/train"), str(data / "tokenizer"))
        keys = [
            f"run.directory={run}",
            f"data.train={data / 'shards/train'}",
            f"data.validation={data / 'shards/validation'}",
        ]
        keys += [f"model.tokenizer={data / 'tokenizer'}", "log.trackers=none", *overrides]
        start = time.monotonic()
        command("trainer.train", GLYPHS, *keys)
        took = time.monotonic() - start
        losses, scores = logged(run)
    recalls = [scores.get(f"{way}_r1", 0.0) for way in ("image_to_text", "text_to_image")]
    text = f"R@1 {100 * recalls[0]:.1f}% and {100 * recalls[1]:.1f}%, loss {losses[0]:.2f} -> {losses[-1]:.3f}, {took:.0f} s"
    return Measured(text, min(recalls) >= 0.7, {"seconds": took, **scores})


def toy() -> Measured:
    """The same path on forty tiny pairs."""
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder) / "pairs", tiny_captions(40))
        recipe = Path(folder) / "recipe.yaml"
        tree = {
            "run": {"directory": f"{folder}/run", "samples": 320},
            "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
            "data": {"train": str(shards), "validation": str(shards), "workers": 0},
            "batch": {"size": 16, "micro_batch": 8},
            "optim": {"lr": 3e-3},
            "log": {"trackers": "none", "every": 1},
        }
        recipe.write_text(yaml.safe_dump(tree))
        from trainer import train

        assert train.main([str(recipe)]) == 0
        losses, scores = logged(Path(folder) / "run")
    return Measured(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {len(scores)} scores", losses[-1] < losses[0])


def checks(dry: bool) -> list[Check]:
    if dry:
        return [Check("a run on forty pairs", "the loss falls", toy)]
    return [
        Check(
            "the quickstart's recipe, 240,000 pairs",
            "R@1 >= 70% both ways",
            partial(quickstart, ["run.samples=240000"]),
        ),
        Check(
            "its start in two passes and fp16",
            "R@1 >= 1%",
            partial(quickstart_start, ["engine.precision=fp16", "batch.micro_batch=32", "run.samples=64000"]),
        ),
    ]


def quickstart_start(overrides: Sequence[str]) -> Measured:
    found = quickstart(overrides)
    scores = [value for name, value in found.facts.items() if name.endswith("_r1")]
    return found._replace(ok=min(scores, default=0.0) >= 0.01)
