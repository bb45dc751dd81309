"""What each optimizer keeps of a parameter, how long its update takes, and what it learns in equal steps.

    python -m tests.benchmarks.optimizers                                # about forty minutes on a busy core
    python -m tests.benchmarks.optimizers --pairs 1280 --out /tmp/optimizers      # does it run?

Bytes and time are of the towers of a SigLIP of 6 + 6 layers of width 512 (one thread, float32 gradients): the state
that two updates leave behind, and the faster of five updates. Quality is the quickstart's model trained from nothing
on the glyph pairs by the real command on one rank, with the softmax loss and batches of 64 (SigLIP's loss hardly begins
in so few steps): R@1 of both directions on unseen pairs, at each of three rates. What is there
already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests.benchmarks.finetune import make_data
from tests.benchmarks.plan import Setting
from tests.support.tiny_models import tiny_tokenizer
from trainer.core.partitioned import Moment
from trainer.models import build
from trainer.optim import (
    AdafactorSettings,
    AdamWSettings,
    LambSettings,
    LionSettings,
    MuonSettings,
    OptimSettings,
    build_optimizer,
)


@dataclass(frozen=True)
class Row:
    name: str
    settings: OptimSettings
    rates: tuple[float, ...]


RATES = (5e-4, 1e-3, 2e-3)
ROWS = [
    Row("adamw", AdamWSettings(), RATES),
    Row("adamw, bfloat16 moments", AdamWSettings(moments="bfloat16"), RATES),
    Row("adamw, int8 moments", AdamWSettings(moments="int8"), RATES),
    Row("adafactor", AdafactorSettings(), RATES),
    Row("lion", LionSettings(), (1e-4, 2e-4, 5e-4)),
    Row("lion, bfloat16 moments", LionSettings(moments="bfloat16"), (1e-4, 2e-4, 5e-4)),
    Row("muon", MuonSettings(), (1e-3, 2e-3, 4e-3)),
    Row("lamb", LambSettings(), (2e-3, 5e-3, 1e-2)),
]
KEYS = ["loss.name=softmax", "batch.size=64", "eval.every=0", "checkpoint.every=1000000000", "engine.ds_config=zero0"]


def cost(settings: OptimSettings, layers: int = 6, where: torch.device | None = None) -> tuple[float, float]:
    """Bytes of state a trained parameter, and nanoseconds an update takes for one."""
    tiny_tokenizer()
    torch.manual_seed(0)
    model = build(Setting("", width=512, layers=layers).settings()).to(where or torch.device("cpu"))
    optimizer = build_optimizer(model, settings, model.parameter_groups())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        optimizer.step()
        if where is not None and where.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    count = sum(parameter.numel() for parameter in model.parameters())
    held = [value for state in optimizer.state.values() for value in state.values()]
    return sum(map(num_bytes, held)) / count, 1e9 * min(seconds[2:]) / count


def num_bytes(value: Any) -> int:
    if isinstance(value, Moment):
        return value.num_bytes
    return value.nbytes if isinstance(value, torch.Tensor) and value.dim() else 0


def train(row: Row, rate: float, options: argparse.Namespace) -> float:
    """R@1 after a run at that rate, in percent."""
    run = options.out / f"{row.name.replace(', ', '-').replace(' ', '-')}-{rate:g}"
    decay = 0.05 * (2e-3 / rate if row.settings.name == "lion" else 1.0)  # the same shrinking a step
    keys = [
        *KEYS,
        f"run.directory={run}",
        f"run.samples={options.pairs}",
        f"data.train={options.data / 'shards' / 'train'}",
        f"data.validation={options.data / 'shards' / 'test'}",
        f"model.tokenizer={options.data / 'tokenizer'}",
        f"optim.name={row.settings.name}",
        f"optim.lr={rate}",
        f"optim.weight_decay={decay}",
    ]
    if row.settings.name != "muon":
        keys.append(f"optim.moments={row.settings.moments}")
    command = [sys.executable, "-W", "ignore", "-m", "trainer.train", "trainer/recipes/glyphs.yaml", *keys]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    notes = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    [found] = [note["eval"] for note in notes if "eval" in note][-1:]
    recalls = [value for key, value in found.items() if key.endswith(("image_to_text_r1", "text_to_image_r1"))]
    assert len(recalls) == 2, found
    return 100 * sum(recalls) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("demo"), help="where the quickstart keeps its pairs, shards and tokenizer"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--pairs", type=int, default=24_000)
    parser.add_argument("--no-training", action="store_true", help="bytes and time alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.no_training:
        make_data(options.data)
    print(
        "| `optim` | bytes of state a parameter | ns an update of a parameter | R@1 at each rate |\n|---|---:|---:|---|",
        flush=True,
    )
    for row in ROWS:
        held, nanoseconds = cost(row.settings)
        found = [] if options.no_training else [(rate, train(row, rate, options)) for rate in row.rates]
        best = max((score for _, score in found), default=0.0)
        cells = [
            f"{'**' if score == best else ''}{score:.1f}%{'**' if score == best else ''} ({rate:g})"
            for rate, score in found
        ]
        print(f"| {row.name} | {held:.2f} | {nanoseconds:.1f} | {', '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
