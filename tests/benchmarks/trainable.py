"""What an adapter or a locked tower saves against full finetuning: the planner's forecast beside what a real step
holds.

    python -m tests.benchmarks.trainable  # a SigLIP of 8 + 8 layers of width 256, one rank, ZeRO-0, fp32: a minute
    python -m tests.benchmarks.trainable --precision bf16

Trainable parameters; bytes of AdamW's moments (measured: the tensors in the optimizer's state); bytes that a
micro-batch leaves alive for its backward pass (measured: live tensor memory after the forward less before it,
tests/benchmarks/allocator.py); the peak of a step.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  ranks are forked: what they need is imported once
import torch

from tests.benchmarks import allocator
from tests.benchmarks.plan import Setting, batch_of, predicted, train_three_steps
from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import tiny_tokenizer

MIB = 1 << 20
WAYS: dict[str, dict[str, Any]] = {
    "full finetuning": {},
    "LoRA, all linear layers": {"lora": {"rank": 16}},
    "LoRA, queries and values": {"lora": {"rank": 16, "targets": ["q_proj", "v_proj"]}},
    "LoRA, queries and values, recomputed": {
        "lora": {"rank": 16, "targets": ["q_proj", "v_proj"]},
        "recompute": {"image": "all", "text": "all"},
    },
    "image tower locked (LiT)": {"lock": {"image": True}},
}


@dataclass(frozen=True)
class Cost:
    """Parameters, and bytes."""

    trainable: int
    optimizer: float
    activations: float
    peak: float


def forecast_cost(setting: Setting) -> Cost:
    """What the planner says."""
    peak, survey = predicted(setting)
    return Cost(survey.trainable // 4, peak.parts["optimizer"], survey.training.saved(setting.micro_batch), peak.total)


def measured_cost(setting: Setting) -> Cost:
    """What a real engine holds."""
    [cost] = run_ranks(_measure, 1, setting, timeout=300)
    return cost


def _measure(setting: Setting) -> Cost:
    engine = train_three_steps(setting)
    peak = allocator.peak_bytes()
    state = engine.ds_engine.optimizer.state.values()
    moments = sum(value.nbytes for held in state for value in held.values() if torch.is_tensor(value) and value.dim())
    model, micro = engine.module, batch_of(setting).split(setting.micro_batch)[0]
    before = allocator.live_bytes()
    z = model(micro.pixels if model.trains("image") else None, micro.tokens if model.trains("text") else None)
    activations = allocator.live_bytes() - before
    del z
    return Cost(sum(p.numel() for p in model.parameters() if p.requires_grad), moments, activations, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=64, help="pixels; patches are 8 x 8")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tiny_tokenizer()  # made once, before ranks are forked
    setting = Setting("", rows=32, micro_batch=8, ds_config="zero0", **vars(options))
    print("| | trainable M | moments MiB | activations of a micro-batch MiB | peak of a step MiB |")
    print("|---|---:|---:|---:|---:|")
    for name, model in WAYS.items():
        one = replace(setting, model=model)
        guess, truth = forecast_cost(one), measured_cost(one)
        assert guess.trainable == truth.trainable
        pairs = ((guess.optimizer, truth.optimizer), (guess.activations, truth.activations), (guess.peak, truth.peak))
        cells = " | ".join(f"{forecast / MIB:.1f} / {measured / MIB:.1f}" for forecast, measured in pairs)
        print(f"| {name} | {truth.trainable / 1e6:.2f} | {cells} |", flush=True)
    print("\nforecast / measured")


if __name__ == "__main__":
    main()
