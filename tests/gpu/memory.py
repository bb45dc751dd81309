"""The planner against the CUDA allocator, and a step under a real limit of memory."""

from __future__ import annotations

import gc
import tempfile
from functools import partial
from typing import Any

import torch

from tests.benchmarks.plan import Setting, predicted
from tests.gpu.checks import Check, Measured, Skip, on_gpu
from tests.support.tiny_models import tiny_tokenizer
from trainer.core import distributed
from trainer.core.types import Batch
from trainer.engine import EngineSettings, build_engine
from trainer.losses import SigmoidLoss, SigmoidSettings
from trainer.models import ModelSettings, build
from trainer.optim import AdafactorSettings, AdamWSettings, MuonSettings, OptimSettings, build_optimizer
from trainer.plan.memory import Job, forecast
from trainer.plan.model_shapes import KNOWN, stand_in
from trainer.plan.profile import look
from trainer.plan.search import zero_section
from trainer.step import train_step

LIMIT = 0.10


def real_settings(name: str, folder_settings: ModelSettings, extra: dict[str, Any]) -> ModelSettings:
    """The architecture of a well-known model with random weights."""
    return ModelSettings.model_validate({"config": KNOWN[name], "tokenizer": folder_settings.path, **extra})


def batch_for(model: Any, rows: int) -> Batch:
    preprocess = model.preprocess
    pixels = torch.randint(0, 256, (rows, 3, *preprocess.image_size), dtype=torch.uint8)
    tokens = torch.randint(2, 20, (rows, preprocess.num_tokens))
    fields = (pixels, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows), torch.arange(rows))
    return Batch(*(field.pin_memory() if on_gpu() else field for field in fields))  # as the loader gives them


def peak_of_training(
    settings: ModelSettings,
    rows: int,
    micro_batch: int,
    ds_config: str,
    precision: str,
    optim: OptimSettings | None = None,
) -> int:
    """Largest memory of tensors in the third step, beyond what was there before (engines at ZeRO-3 leave something)."""
    before = torch.cuda.memory_allocated()
    engine_settings = EngineSettings(ds_config=ds_config, precision=precision)  # type: ignore[arg-type]
    model = build(settings)
    engine = build_engine(model, build_optimizer(model, optim or AdamWSettings()), engine_settings, clip=1.0)
    batch, loss = batch_for(model, rows), SigmoidLoss()
    del model
    for _ in range(2):
        train_step(engine, batch, loss, micro_batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    train_step(engine, batch, loss, micro_batch)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    engine.close()
    return peak


def planned(
    name: str,
    extra: dict[str, Any],
    rows: int,
    micro_batch: int,
    ds_config: str,
    precision: str,
    optim: OptimSettings | None = None,
) -> Measured:
    if not on_gpu():
        raise Skip("tests/benchmarks/plan.py measures the planner on the CPU")
    distributed.init(60)
    with tempfile.TemporaryDirectory(), stand_in(ModelSettings(path=name), KNOWN[name]) as known:
        settings = real_settings(name, known, extra)
        survey = look(settings, precision, "cuda")
        job = Job(1, rows, micro_batch, loss=SigmoidSettings(), optim=optim or AdamWSettings())
        guess = forecast(survey, zero_section(ds_config), job).total
        truth = peak_of_training(settings, rows, micro_batch, ds_config, precision, optim)
    gc.collect()
    torch.cuda.empty_cache()
    error = guess / truth - 1
    text = f"forecast {guess / 2**30:.2f} GiB, measured {truth / 2**30:.2f} GiB, {100 * error:+.1f}%"
    return Measured(text, abs(error) <= LIMIT, {"forecast": guess, "measured": truth})


def tiny_forecast() -> Measured:
    """That the planner itself answers here, at any size."""
    tiny_tokenizer()
    peak, _ = predicted(Setting("tiny", width=64, layers=2, side=32, rows=8))
    return Measured(f"{peak.total / 2**20:.1f} MiB", peak.total > 0)


def under_a_limit() -> Measured:
    """The card is made too small for a step's micro-batch: the step is repeated with half of it and the run goes on."""
    if not on_gpu():
        raise Skip("needs torch.cuda.set_per_process_memory_fraction")
    distributed.init(60)
    setting = Setting("limit", width=512, layers=8, side=128, rows=64)
    settings = setting.settings()
    peaks = {}
    for rows in (64, 32):
        gc.collect()
        torch.cuda.empty_cache()
        peaks[rows] = peak_of_training(settings, 64, rows, "zero1", "bf16")
    gc.collect()
    torch.cuda.empty_cache()
    limit = (peaks[64] + peaks[32]) / 2
    total = torch.cuda.get_device_properties(0).total_memory
    model = build(settings)
    engine_settings = EngineSettings(ds_config="zero1", precision="bf16")
    engine = build_engine(model, build_optimizer(model, AdamWSettings()), engine_settings, clip=1.0)
    batch = batch_for(model, 64)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        results = [train_step(engine, batch, SigmoidLoss(), 64), train_step(engine, batch, SigmoidLoss(), 32)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    text = f"limit {limit / 2**30:.2f} GiB: micro-batch 64 -> {results[0].micro_batch}, loss {results[1].loss:.3f}"
    return Measured(text, (results[0].micro_batch or 64) < 64 and results[1].loss == results[1].loss)


def checks(dry: bool) -> list[Check]:
    base, large = "google/siglip-base-patch16-224", "openai/clip-vit-large-patch14-336"
    lora = {"lora": {"rank": 16}}
    cases: list[tuple[str, str, dict[str, Any], int, int, str, str]] = [
        ("SigLIP ViT-B/16, one pass", base, {}, 32, 32, "zero1", "bf16"),
        ("SigLIP ViT-B/16, two passes", base, {}, 256, 32, "zero1", "bf16"),
        ("SigLIP ViT-B/16, two passes, ZeRO-3", base, {}, 128, 32, "zero3", "bf16"),
        ("CLIP-L/14-336 LoRA, two passes", large, lora, 64, 8, "zero1", "bf16"),
        ("CLIP-L/14-336 LoRA, fp16", large, lora, 64, 8, "zero1", "fp16"),
    ]
    found = [
        Check(title, f"within {100 * LIMIT:.0f}%", partial(planned, name, extra, rows, micro, config, precision))
        for title, name, extra, rows, micro, config, precision in (cases[:1] if dry else cases)
    ]
    optimizers = [
        Check(
            f"SigLIP ViT-B/16, {title}",
            f"within {100 * LIMIT:.0f}%",
            partial(planned, base, {}, 64, 16, "zero0", "bf16", optim),
        )
        for title, optim in (
            ("AdamW, int8 moments", AdamWSettings(moments="int8")),
            ("Adafactor", AdafactorSettings()),
            ("Muon", MuonSettings()),
        )
    ]
    found += [] if dry else optimizers
    return [
        Check("the planner answers", "a peak", tiny_forecast),
        *found,
        Check("a card that is too small", "the step is repeated with half", under_a_limit),
    ]
