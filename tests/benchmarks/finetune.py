"""Finetuning one pretrained model in four ways: what is learnt, what is forgotten, what it costs.

    python -m tests.benchmarks.finetune                                        # about five minutes on two idle cores
    python -m tests.benchmarks.finetune --rows forgetting                      # what is lost with each remedy
    python -m tests.benchmarks.finetune --pretrain 2048 --finetune 1024 --out /tmp/finetune      # does it run?

The quickstart's model is pretrained from nothing on the glyph pairs of one half of the scripts (OLD) and finetuned on
the other half (NEW), each time from the exported Hugging Face directory, by the real commands on two ranks. Retrieval
is measured on unseen (character, face) pairs of both halves: what is gained on NEW, and what is lost on OLD. Memory is
the peak of tensor memory of a rank from before the model is built (tests/benchmarks/allocator.py). What is there
already is not done again. Then finished runs are mixed by `trainer.export`: means of models and of a model and its base.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

OLD = ("latin", "cyrillic", "georgian", "hebrew")
NEW = ("greek", "canadian", "arabic", "armenian", "lao")
RECIPE = "trainer/recipes/glyphs.yaml"
ALWAYS = ["data.validation=''", "eval.every=0", "checkpoint.every=1000000000", "loss.name=softmax", "batch.size=64"]
"""Small batches and CLIP's loss: in the few hundred steps that there is time for, SigLIP's hardly begins to learn from
nothing."""
PEAK = "peak_bytes"


@dataclass(frozen=True)
class Row:
    """A way to finetune: the recipe's keys, and what has to be made first, which may add keys."""

    name: str
    overrides: tuple[str, ...]
    prepare: Callable[[Bench], list[str]] | None = None


def embed_images(bench: Bench) -> list[str]:
    """Stores the locked image tower's embeddings of the NEW half beside its shards."""
    from trainer import embed

    keys = [
        f"data.train={bench.shards('train', NEW)}",
        *bench.pretrained(),
        "model.lock.image=true",
        "model.precomputed.image=base",
    ]
    embed.main([RECIPE, f"run.directory={bench.out / 'runs' / 'embed'}", *keys])
    return ["model.precomputed.image=base"]


def teach(bench: Bench) -> list[str]:
    """The base looks at the same batches, and the student's similarities follow its own."""
    return [f"distill.teacher={bench.out / 'base'}"]


def replay(bench: Bench) -> list[str]:
    """Three pairs in ten of the OLD half."""
    sources = ((bench.shards("train", NEW), 0.7), (bench.shards("train", OLD), 0.3))
    mixture = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in sources)
    return [f"data.train=[{mixture}]"]


FULL = "full finetuning"
FORGETTING = [
    Row(FULL, ("optim.lr=1.0e-3",)),
    Row("a tenth of the rate", ("optim.lr=1.0e-4",)),
    Row("lower layers slower (layer_decay 0.65)", ("optim.lr=1.0e-3", "model.rates={head: 10, layer_decay: 0.65}")),
    Row("the base as teacher (distill.weight 1)", ("optim.lr=1.0e-3",), teach),
    Row("replay: 30% of the pairs from OLD", ("optim.lr=1.0e-3",), replay),
]
"""Against forgetting; what is mixed with the base stands below."""
ROWS = [
    Row(FULL, ("optim.lr=1.0e-3",)),
    Row("LoRA, rank 16, all linear layers", ("optim.lr=4.0e-3", "model.lora={rank: 16}")),
    Row("LiT: image tower locked", ("optim.lr=1.0e-3", "model.lock.image=true")),
    Row("SigLiT: the same on stored embeddings", ("optim.lr=1.0e-3", "model.lock.image=true"), embed_images),
]


SEEDS = (1, 2)
"""Of the runs that are averaged with the first."""
MIXES: list[tuple[str, list[str]]] = [
    ("full finetuning, 3/4 of the way (WiSE-FT)", ["full-finetuning", "--interpolate", "base", "0.75"]),
    ("full finetuning, 1/2 of the way", ["full-finetuning", "--interpolate", "base", "0.5"]),
    ("full finetuning, 1/4 of the way", ["full-finetuning", "--interpolate", "base", "0.25"]),
    ("mean of three full finetunings (soup)", ["full-finetuning", "--average", *(f"full-{seed}" for seed in SEEDS)]),
    (
        "that mean, 1/2 of the way",
        ["full-finetuning", "--average", *(f"full-{seed}" for seed in SEEDS), "--interpolate", "base", "0.5"],
    ),
]
"""What `trainer.export` makes of finished runs: no training, hence neither memory nor speed."""


@dataclass(frozen=True)
class Bench:
    """Where things lie, and how long the runs are."""

    data: Path
    out: Path
    pretrain: int
    finetune: int
    ranks: int

    def pretrained(self) -> list[str]:
        """The keys that start from the pretrained model: its path takes the place of the recipe's config, and its
        tokenizer."""
        return ["model.config=null", "model.tokenizer=null", f"model.path={self.out / 'base'}"]

    def shards(self, part: str, scripts: tuple[str, ...]) -> Path:
        """A view of the glyph pairs of some scripts."""
        from data_tools.commands import filter as filter_verb

        view = self.out / "shards" / part / ("old" if scripts == OLD else "new")
        if not (view / "manifest.json").is_file():
            condition = f"character ~ ^({'|'.join(scripts)}) "
            filter_verb.main([str(self.data / "shards" / part), str(view), "--where", condition, "--processes", "1"])
        return view

    def train(self, name: str, samples: int, scripts: tuple[str, ...], *overrides: str) -> Path:
        """A run of the training command on all ranks; leaves its peak of tensor memory beside the log."""
        run = self.out / "runs" / name
        keys = [
            *ALWAYS,
            f"run.directory={run}",
            f"run.samples={samples}",
            f"data.train={self.shards('train', scripts)}",
            f"model.tokenizer={self.data / 'tokenizer'}",
            *overrides,
        ]
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.ranks}",
            "-m",
            __spec__.name,
            "--as-rank",
        ]
        subprocess.run([sys.executable, *command, RECIPE, *keys], check=True)
        return run


def as_rank(argv: list[str]) -> int:
    """What every rank runs: the training command under the counting allocator."""
    from tests.benchmarks import allocator
    from trainer import config, train

    allocator.install()
    code = train.main(argv)
    folder = config.load(Path(argv[0]), argv[1:]).run.directory
    if os.environ["RANK"] == "0" and not (folder / PEAK).exists():  # a run that was finished already trained nothing
        (folder / PEAK).write_text(str(allocator.peak_bytes()))
    return code


def make_data(folder: Path) -> None:
    """The quickstart's shards and tokenizer, where it has not left them."""
    from data_tools.commands import glyphs, shard, vocabulary

    glyphs.main([str(folder / "pairs")])
    for part in ("train", "test"):
        if not (folder / "shards" / part / "manifest.json").is_file():
            pairs = str(folder / "pairs" / f"{part}.csv")
            shard.main([pairs, str(folder / "shards" / part), "--image", "image", "--caption", "caption", "--quiet"])
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        vocabulary.main([str(folder / "shards" / "train"), str(folder / "tokenizer")])


def recall(bench: Bench, model: Path) -> dict[str, float]:
    """R@1 of both directions together on unseen pairs, by half."""
    from trainer.evals import EvalSettings, evaluate
    from trainer.evaluate import load_model

    loaded, _ = load_model(str(model))
    paths = [str(bench.shards("test", scripts)) for scripts in (OLD, NEW)]
    metrics = evaluate(loaded, EvalSettings(data=paths, limit=0), loaded.preprocess, 0, 1).metrics
    return {
        half: (metrics[f"{half}/image_to_text_r1"] + metrics[f"{half}/text_to_image_r1"]) / 2 for half in ("old", "new")
    }


def trained_millions(run: Path) -> float:
    """Parameters with a gradient, in millions."""
    from trainer import config
    from trainer.models import build

    model = build(config.load(run / "recipe.yaml").model, weights=False)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("demo"), help="where the quickstart keeps its pairs, shards and tokenizer"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--pretrain", type=int, default=64_000, metavar="PAIRS")
    parser.add_argument("--finetune", type=int, default=24_000, metavar="PAIRS")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", choices=("ways", "forgetting"), default="ways", help="ways to train, or remedies")
    options = parser.parse_args()
    rows = FORGETTING if options.rows == "forgetting" else ROWS
    from trainer import export

    bench = Bench(options.data, options.out, options.pretrain, options.finetune, options.ranks)
    make_data(bench.data)
    pretrained = bench.train("pretrained", bench.pretrain, OLD)
    base = bench.out / "base"
    export.main([str(pretrained), str(base)])
    before = recall(bench, base)
    lines = [
        "| | trained M | NEW scripts, R@1 | OLD scripts, R@1 | peak MiB a rank | pairs/s |",
        "|---|---:|---:|---:|---:|---:|",
        f"| pretrained on OLD | {trained_millions(pretrained):.2f} | {100 * before['new']:.1f}% | "
        f"{100 * before['old']:.1f}% | | |",
    ]
    for row in rows:
        keys = [*bench.pretrained(), *row.overrides, *(row.prepare(bench) if row.prepare else [])]
        run = bench.train(row.name.split(":")[0].split(",")[0].replace(" ", "-"), bench.finetune, NEW, *keys)
        after = recall(bench, run)
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line]
        memory, last = int((run / PEAK).read_text()) / 2**20, steps[-1]
        speed = f"{last['samples_seen'] / last['seconds']:.0f}"
        halves = " | ".join(
            f"{100 * after[half]:.1f}% ({100 * (after[half] - before[half]):+.1f})" for half in ("new", "old")
        )
        lines.append(f"| {row.name} | {trained_millions(run):.2f} | {halves} | {memory:.0f} | {speed} |")
    for seed in SEEDS:
        bench.train(f"full-{seed}", bench.finetune, NEW, *bench.pretrained(), *ROWS[0].overrides, f"run.seed={seed}")
    places = {"base": str(base)} | {path.name: str(path) for path in (bench.out / "runs").iterdir()}
    for number, (name, words) in enumerate(MIXES):
        run, *options_of = [places.get(word, word) for word in words]
        out = bench.out / "mixes" / str(number)
        export.main([run, str(out), *options_of])
        after = recall(bench, out)
        halves = " | ".join(
            f"{100 * after[half]:.1f}% ({100 * (after[half] - before[half]):+.1f})" for half in ("new", "old")
        )
        lines.append(f"| {name} | | {halves} | | |")
    print("\n".join(lines))
    (bench.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        sys.exit(as_rank(sys.argv[2:]))
    main()
