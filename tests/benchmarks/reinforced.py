"""Learning from a teacher whose embeddings are stored, against running it and against none, on the glyph pairs.

    python -m tests.benchmarks.reinforced TEACHER --shards demo/shards --tokenizer demo/tokenizer --out /tmp/reinforced

TEACHER is an exported model with the student's image size and tokenizer, for example the quickstart's recipe with larger
towers. Every contender trains the quickstart's student from nothing on the same pairs in the same order at batch 128 on
one rank: plain, with augmented images, taught by the stored teacher, taught by the same teacher run (first seed alone).
With --crop 1 nothing is augmented, and the two taught ones see the same images: their curves are to be equal.
The table has R@1 on the validation pairs, mean of both directions, with the spread over seeds, and the processor time of
a step (waiting for other programs does not count) relative to that of the plain student, loader included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.forked_ranks import run_ranks
from trainer import embed, run, train


def trained(seconds: Path, arguments: list[str]) -> int:
    """A run, which leaves the processor seconds of each of its steps in a file."""
    real, ends = run.train_step, list[float]()

    def step(*given: Any, **more: Any) -> Any:
        result = real(*given, **more)
        ends.append(time.process_time())
        return result

    run.train_step = step
    code = train.main(arguments)
    seconds.write_text(json.dumps(np.diff(ends).tolist()))
    return code


def score(directory: Path) -> float:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines() if '"eval"' in line]
    return 50.0 * (lines[-1]["eval"]["image_to_text_r1"] + lines[-1]["eval"]["text_to_image_r1"])


def losses(directory: Path) -> np.ndarray[Any, Any]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    return np.array([line["loss"] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--shards", type=Path, required=True, help="train and validation")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=38400)
    parser.add_argument("--crop", type=float, default=0.8, help="least share of an image that a crop keeps")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shards = options.out / "train"
    if not shards.exists():
        shutil.copytree(options.shards / "train", shards)
    recipe = [
        "glyphs",
        f"data.train={shards}",
        f"data.validation={options.shards / 'validation'}",
        f"model.tokenizer={options.tokenizer}",
        f"run.samples={options.samples}",
        "data.workers=0",
        "data.cache_decoded=0",
        "eval.every=0",
        "checkpoint.every=100000000",
        "log.every=1",
    ]
    augment = [f"data.augment.crop_scale=[{options.crop},1]"] if options.crop < 1 else []
    column = f"crop{options.crop}-views{options.views if augment else 1}"
    weight = f"distill.weight={options.weight}"
    stored = [*augment, weight, f"distill.stored={column}"]
    began = time.perf_counter()
    views = ["--views", str(options.views if augment else 1)]
    assert run_ranks(embed.main, 2, [*recipe, *stored, f"distill.teacher={options.teacher}", *views], timeout=3600) == [
        0,
        0,
    ]
    print(f"embedded in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    contenders = {"plain": []}
    if augment:
        contenders["augmented images"] = augment
    contenders["stored teacher"] = stored
    contenders["the teacher run"] = [*augment, weight, f"distill.teacher={options.teacher}"]
    found: dict[str, list[float]] = {name: [] for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(options.seeds):
        for name, more in contenders.items():
            if name == "the teacher run" and seed:
                continue
            out = options.out / column / f"{name.replace(' ', '-')}-{seed}"
            out.parent.mkdir(exist_ok=True)
            given = [*recipe, *more, f"run.seed={seed}", f"run.directory={out}"]
            assert run_ranks(trained, 1, out.with_suffix(".json"), given, timeout=3600) == [0]
            found[name].append(score(out))
            times[name] += json.loads(out.with_suffix(".json").read_text())[5:]
            print(f"{name}, seed {seed}: {found[name][-1]:.1f}", file=sys.stderr, flush=True)
    base = statistics.median(times["plain"])
    print("| | R@1 | processor time of a step |\n|---|---:|---:|")
    for name, scores in found.items():
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        print(f"| {name} | {statistics.mean(scores):.1f}{spread} | {statistics.median(times[name]) / base:.2f} |")
    pair = [losses(options.out / column / f"{name}-0") for name in ("stored-teacher", "the-teacher-run")]
    print(f"loss, mean of the last 50 steps: stored {pair[0][-50:].mean():.4f}, run {pair[1][-50:].mean():.4f}")


if __name__ == "__main__":
    main()
