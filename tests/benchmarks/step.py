"""Time and peak tensor memory of one training step, ours against what peers do, on the same model and data in one run.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.step                       # 2 CPU ranks; prints a markdown table
    OMP_NUM_THREADS=1 python -m tests.benchmarks.step --rows 256 512 1024 --micro-batches 8 --rounds 7 --plot step.png

Contenders take turns within a round, so that a busy machine is busy for all of them; the table holds medians of each
rank's processor time (waiting for other programs does not count) and of wall time.

    plain            one pass over the local batch, our step: the fastest there is, where it fits
    two-pass         our step in micro-batches: exact
    feature cache    as open_clip's --accum-freq: cached features of all micro-batches, one of them replaced by fresh ones, and the
                     whole loss again for each. Our ring loss is used in it, so that the algorithm alone differs. No
                     random state is replayed.
    local loss       each micro-batch is contrasted with itself alone. Another objective: a bound on speed, not an alternative.
    HF Trainer       the same, as a real transformers.Trainer run under DeepSpeed, after the others (it brings its own loop).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import hf_trainer
from tests.support.dense_step import Case
from tests.support.forked_ranks import run_ranks
from tests.support.tensor_memory import TensorMemory
from tests.support.tiny_models import tiny_tokenizer
from trainer.core import collectives, distributed
from trainer.core.types import Batch, Embeddings
from trainer.engine import Engine, EngineSettings, build_engine
from trainer.losses import SigmoidLoss
from trainer.models import ModelSettings, build
from trainer.optim import AdamWSettings, build_optimizer
from trainer.step import train_step

TOKENS, SIDE = 16, 32
Step = Callable[[Engine, Batch, int], Any]


def model() -> Any:
    """Two 3-layer towers of width 128: 32 x 32 images in 16 patches, 16 tokens."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = {
        "model_type": "siglip",
        "vision_config": {**tower, "image_size": SIDE, "patch_size": 8},
        "text_config": {**tower, "max_position_embeddings": TOKENS},
    }
    torch.manual_seed(0)
    return build(ModelSettings(config=config, tokenizer=tiny_tokenizer()))


def data(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(distributed.rank())
    pixels = torch.randint(0, 256, (rows, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(2, 20, (rows, TOKENS), generator=generator)
    return Batch(pixels, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows), torch.arange(rows))


def plain(engine: Engine, batch: Batch, micro_batch: int) -> None:
    train_step(engine, batch, SigmoidLoss(), None)


def two_pass(engine: Engine, batch: Batch, micro_batch: int) -> None:
    train_step(engine, batch, SigmoidLoss(), micro_batch)


def feature_cache(engine: Engine, batch: Batch, micro_batch: int) -> None:
    parts = batch.split(micro_batch)
    with torch.no_grad():
        cached = [engine.forward(part.pixels, part.tokens, part.token_mask) for part in parts]
    engine.start_gradients()
    for index, part in enumerate(parts):
        fresh = engine.forward(part.pixels, part.tokens, part.token_mask)
        image = torch.cat([fresh.image if i == index else z.image for i, z in enumerate(cached)])
        text = torch.cat([fresh.text if i == index else z.text for i, z in enumerate(cached)])
        engine.backward(SigmoidLoss()(Embeddings(image, text, fresh.scale, fresh.bias)))
    engine.finish_gradients()
    engine.step()


def local_loss(engine: Engine, batch: Batch, micro_batch: int) -> None:
    parts = batch.split(micro_batch)
    engine.start_gradients()
    for part in parts:
        z = engine.forward(part.pixels, part.tokens, part.token_mask)
        logits: Tensor = z.scale * z.image @ z.text.T + z.bias
        signs = 2 * torch.eye(len(logits)) - 1
        engine.backward(-torch.nn.functional.logsigmoid(signs * logits).sum() / len(logits) / len(parts))
    engine.finish_gradients()
    engine.step()


CONTENDERS: dict[str, Step] = {
    "plain": plain,
    "two-pass": two_pass,
    "feature cache": feature_cache,
    "local loss": local_loss,
}
Times = dict[str, tuple[list[float], list[float], int]]


def measure(rows: int, micro_batches: int, rounds: int, ds_config: str) -> Times:
    """On one rank: contender -> (processor seconds, wall seconds, peak bytes) of steps on ``rows`` local pairs."""
    built = model()
    optimizer = build_optimizer(built, AdamWSettings(lr=1e-4))
    engine = build_engine(built, optimizer, EngineSettings(ds_config=ds_config, precision="fp32"))
    batch, micro_batch = data(rows), rows // micro_batches
    found: Times = {}
    for name, step in CONTENDERS.items():  # also warms up
        with TensorMemory() as memory:
            step(engine, batch, micro_batch)
        found[name] = ([], [], memory.peak)
    for _ in range(rounds):
        for name, step in CONTENDERS.items():
            collectives.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            step(engine, batch, micro_batch)
            found[name][0].append(time.process_time() - processor)
            found[name][1].append(time.perf_counter() - wall)
    return found


def measure_trainer(rows: int, micro_batches: int, rounds: int, ds_config: str) -> tuple[list[float], list[float], int]:
    """The same for a Hugging Face Trainer, on fresh ranks."""
    return hf_trainer.measure(model(), data(rows), micro_batches, rounds, stage=int(ds_config.removeprefix("zero")[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024], help="global batches")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ds-config", default="zero0")
    parser.add_argument("--plot", help="a PNG of time and memory over the global batch")
    options = parser.parse_args()
    Case().model()  # imports what forked ranks would import one by one
    print("| global batch | micro-batches | step | pairs/s | processor s | x plain | wall s | peak MiB |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for rows in options.rows:
        for micro_batches in options.micro_batches:
            arguments = (rows // options.ranks, micro_batches, options.rounds, options.ds_config)
            found = run_ranks(measure, options.ranks, *arguments, timeout=600)[0]
            found["HF Trainer"] = run_ranks(measure_trainer, options.ranks, *arguments, timeout=600)[0]
            base = statistics.median(found["plain"][0])
            for name, (processor, wall, peak) in found.items():
                seconds = statistics.median(processor)
                curves.setdefault(name, []).append((rows, rows / seconds, peak / 2**20))
                cells = [rows, micro_batches, name, f"{rows / seconds:.0f}", f"{seconds:.3f}", f"{seconds / base:.2f}"]
                print(
                    "|",
                    *[f"{cell} |" for cell in [*cells, f"{statistics.median(wall):.3f}", f"{peak / 2**20:.1f}"]],
                    flush=True,
                )
    if options.plot:
        plot(curves, options.plot)


def plot(curves: dict[str, list[tuple[int, float, float]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, column, label in (
        (axes[0], 1, "pairs per processor second"),
        (axes[1], 2, "peak tensor memory of a step (MiB)"),
    ):
        for name, points in curves.items():
            by_rows = sorted({point[0]: point for point in points}.values())
            axis.plot([point[0] for point in by_rows], [point[column] for point in by_rows], marker="o", label=name)
        axis.set(xlabel="global batch", ylabel=label, xscale="log", ylim=(0, None))
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
