"""The planner's forecast against the measured peak of tensor memory, setting by setting.

    python -m tests.benchmarks.plan [--only zero3] [--table /tmp/table_plan.md]

Every setting runs three real training steps (DeepSpeed, ``trainer.step``, two passes) on real ranks. The peak is
counted by the CPU allocator itself (tests/benchmarks/allocator.py: a c10 allocator that counts every request of every
thread), from before the model is built; the local batch and offloaded states live in the same memory and count too. The
third step is compared: by then the optimizer has its moments.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  ranks are forked: what they need is imported once
import torch

from tests.benchmarks import allocator
from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import tiny_tokenizer
from trainer.core.types import Batch
from trainer.engine import EngineSettings
from trainer.engine.engine import Engine, build_engine
from trainer.losses import SigmoidLoss, SigmoidSettings
from trainer.models import ModelSettings, build
from trainer.optim import (
    AdafactorSettings,
    AdamWSettings,
    LambSettings,
    LionSettings,
    MuonSettings,
    OptimSettings,
    build_optimizer,
)
from trainer.plan.memory import Job, Peak, forecast
from trainer.plan.profile import Survey, look
from trainer.plan.search import zero_section
from trainer.step import train_step


@dataclass(frozen=True)
class Setting:
    """One training that is both forecast and measured."""

    name: str
    width: int = 256
    layers: int = 6
    side: int = 64
    tokens: int = 16
    vocabulary: int = 1000
    kind: str = "siglip"
    ranks: int = 1
    rows: int = 16
    """Local batch."""
    micro_batch: int = 4
    ds_config: str = "zero1"
    precision: str = "fp32"
    grad_reduction: str = "per_step"
    model: dict[str, Any] = field(default_factory=dict)
    """Further keys of ``model:``."""
    optim: OptimSettings = field(default_factory=AdamWSettings)

    def settings(self) -> ModelSettings:
        tower = {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 64,
        }
        config = {
            "model_type": self.kind,
            "vision_config": {**tower, "image_size": self.side, "patch_size": 8},
            "text_config": {**tower, "max_position_embeddings": self.tokens, "vocab_size": self.vocabulary},
        }
        if self.kind == "clip":
            config["projection_dim"] = self.width
        return ModelSettings(config=config, tokenizer=tiny_tokenizer(), **self.model)


NARROW: dict[str, Any] = {"width": 128, "layers": 8, "side": 128, "micro_batch": 8}
"""Activations far above the weights."""
MANY = {**NARROW, "rows": 48, "micro_batch": 24}
"""So many rows that activations decide even when they are recomputed."""
FP16: dict[str, Any] = {"precision": "fp16", "width": 64, "layers": 8, "micro_batch": 8, "ds_config": "zero0"}
"""Little to compute: few processors multiply float16."""
RECOMPUTE = {"recompute": {"image": "all", "text": "all"}}
SETTINGS = [
    Setting("plain pass", micro_batch=16, ds_config="zero0"),
    Setting("8 micro-batches", rows=32),
    Setting("small model, many rows", width=128, layers=4, rows=64, micro_batch=32),
    Setting("larger model", width=512, layers=6, rows=8, micro_batch=2),
    Setting("CLIP", kind="clip", width=320),
    Setting("recomputation", model=RECOMPUTE, **MANY),
    Setting("every 2nd layer", model={"recompute": {"image": 2, "text": "none"}}, **NARROW),
    Setting(
        "recomputation, offloaded to the host",
        model={"recompute": {"image": "all", "text": "all", "offload": True}},
        **MANY,
    ),
    Setting("LoRA", model={"lora": {"rank": 8}}, **NARROW),
    Setting("locked image tower", model={"lock": {"image": True}}, micro_batch=8),
    Setting("bf16", precision="bf16", **NARROW),
    Setting("bf16 recomputation", precision="bf16", model=RECOMPUTE, **MANY),
    Setting("fp16", **FP16),
    Setting("fp16 recomputation", model=RECOMPUTE, **{**FP16, "rows": 96, "micro_batch": 48}),
    Setting("fp16 LoRA, float16 base", model={"lora": {"rank": 8, "base": "float16"}}, **FP16),
    Setting("fp16, wide vocabulary", vocabulary=30000, **FP16),
    Setting("2 ranks", ranks=2, ds_config="zero0"),
    Setting("2 ranks", ranks=2, ds_config="zero1"),
    Setting("2 ranks", ranks=2, ds_config="zero2"),
    Setting("2 ranks, reduced per micro-batch", ranks=2, ds_config="zero2", grad_reduction="per_micro_batch"),
    Setting("2 ranks", ranks=2, ds_config="zero3"),
    Setting("2 ranks, larger model", ranks=2, ds_config="zero3", width=512, rows=8, micro_batch=2),
    Setting("2 ranks, reduced per micro-batch", ranks=2, ds_config="zero3", grad_reduction="per_micro_batch"),
    Setting("2 ranks, offload", ranks=2, ds_config="zero2_offload"),
    Setting("2 ranks, offload", ranks=2, ds_config="zero3_offload"),
    Setting("2 ranks, offload parameters", ranks=2, ds_config="zero3_offload_params"),
    Setting("2 ranks, fp16", ranks=2, **{**FP16, "ds_config": "zero3"}),
    Setting(
        "2 ranks, bf16 recomputation LoRA",
        ranks=2,
        ds_config="zero2",
        precision="bf16",
        model={**RECOMPUTE, "lora": {}},
        micro_batch=16,
    ),
    *(
        Setting(f"{title}{where}", rows=8, optim=optim, ranks=ranks, ds_config=ds_config)
        for title, optim in (
            ("AdamW, bfloat16 moments", AdamWSettings(moments="bfloat16")),
            ("AdamW, int8 moments", AdamWSettings(moments="int8")),
            ("Adafactor", AdafactorSettings()),
            ("Lion", LionSettings()),
            ("Muon", MuonSettings()),
            ("LAMB", LambSettings()),
        )
        for where, ranks, ds_config in (("", 1, "zero0"), (", 2 ranks", 2, "zero1"))
    ),
]


def predicted(setting: Setting) -> tuple[Peak, Survey]:
    """What the planner says; on a CPU the host's part of the peak is in the same memory."""
    survey = look(setting.settings(), setting.precision, "cpu")
    job = Job(
        setting.ranks,
        setting.rows,
        setting.micro_batch,
        setting.grad_reduction,
        SigmoidSettings(),
        optim=setting.optim,
        inputs_on_host=False,
    )
    return forecast(survey, zero_section(setting.ds_config), job), survey


def train_three_steps(setting: Setting) -> Engine:
    """The engine after them, in a rank of its own; ``allocator`` has counted from before the model was built, its peak
    is the third's."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    allocator.install()
    model = build(setting.settings())
    engine_settings = EngineSettings(ds_config=setting.ds_config, precision=setting.precision)  # type: ignore[arg-type]
    engine = build_engine(model, build_optimizer(model, setting.optim), engine_settings, clip=1.0)
    del model
    batch, loss = batch_of(setting), SigmoidLoss()
    for _ in range(3):
        allocator.reset_peak()
        train_step(engine, batch, loss, setting.micro_batch, grad_reduction=setting.grad_reduction)  # type: ignore[arg-type]
    return engine


def measured(setting: Setting) -> float:
    """Bytes at the peak of the third step, the largest over ranks."""
    return max(run_ranks(_train, setting.ranks, setting, timeout=300))


def _train(setting: Setting) -> int:
    train_three_steps(setting)
    return allocator.peak_bytes()


def batch_of(setting: Setting) -> Batch:
    rows, side, tokens = setting.rows, setting.side, setting.tokens
    pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8)
    words = torch.randint(2, 20, (rows, tokens))
    return Batch(pixels, words, torch.ones(rows, tokens, dtype=torch.bool), torch.arange(rows), torch.arange(rows))


def describe(setting: Setting) -> str:
    cells = [
        setting.name,
        f"{setting.kind} {setting.width}x{setting.layers}",
        setting.ranks,
        setting.ds_config,
        setting.precision,
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + f" | {setting.rows} / {setting.micro_batch} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose line of the table holds this text")
    parser.add_argument("--table", type=Path, help="write the markdown table here")
    parser.add_argument("--parts", action="store_true", help="also print what the forecast is made of")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tiny_tokenizer()  # made once, before ranks are forked
    lines = [
        "| setting | model (width x layers) | ranks | ds_config | precision | local / micro-batch | forecast MiB | "
        "measured MiB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for setting in SETTINGS:
        if options.only not in describe(setting):
            continue
        peak, _ = predicted(setting)
        guess, truth = peak.total + peak.host, measured(setting)
        lines.append(
            f"{describe(setting)} {guess / 2**20:.0f} | {truth / 2**20:.0f} | {100 * (guess / truth - 1):+.1f}% |"
        )
        print(lines[-1], flush=True)
        if options.parts:
            parts = {**peak.parts, "host": peak.host}
            print(
                "    ", peak.phase, {name: round(size / 2**20, 1) for name, size in parts.items() if size}, flush=True
            )
    if options.table:
        options.table.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
