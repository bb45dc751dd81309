"""What `finetune` chooses, and why: one line per choice, which the recipe repeats as comments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.config import Recipe
from trainer.core.settings import parse
from trainer.defaults import RATES
from trainer.evals.run import prefixes
from trainer.finetune.calibrate import calibrated_bias
from trainer.finetune.data import Data
from trainer.models import DualEncoder
from trainer.plan.auto import largest_micro_batch

SMALL_MODEL = 20e6
"""Parameters below which an adapter saves nothing."""
FEW_PAIRS = 20_000
"""Below so many pairs whole finetuning of a large model is more likely to spoil than to gain."""
EPOCHS = ((2_000, 30), (10_000, 15), (100_000, 6), (1_000_000, 3))
"""Up to so many pairs, so many epochs; 1 beyond."""
CUT, LONG = 0.1, 248
"""Share of captions that are cut from which a CLIP is made to read longer ones: Long-CLIP's 248 tokens."""
EVALUATIONS = 10
REPLAY = 0.3
"""Share of a batch that is drawn from the pairs to remember."""
BATCH = (32, 1024)


@dataclass
class Plan:
    """A recipe being built."""

    tree: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    own: tuple[str, ...] = ()
    """The metrics of one's own data whose mean is to rise."""
    general: tuple[str, ...] = ()
    """Those of the general set whose mean is not to fall; none where there is no such set."""

    def set(self, key: str, value: Any, why: str) -> None:
        """Sets ``section.key`` and notes why."""
        *sections, last = key.split(".")
        node = self.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
        self.reasons.append(f"{key}: {_words(value)} ({why})")

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe, with sections of ``changes`` laid over it."""
        tree = {key: {**value} if isinstance(value, dict) else value for key, value in self.tree.items()}
        for section, keys in changes.items():
            tree.setdefault(section, {}).update(keys)
        return parse(Recipe, tree, "finetune")


def choose(
    path: str,
    model: DualEncoder,
    data: Data,
    out: Path,
    *,
    label: str | None = None,
    general: str | None = None,
    replay: str | None = None,
    adapter: bool | None = None,
    gpus: int = 1,
) -> Plan:
    """The recipe for ``model`` (from ``path``) on ``data``."""
    plan = Plan({"run": {"directory": str(out / "run")}, "model": {"path": path}})
    plan.tree["data"] = {"train": data.train, "validation": data.validation}
    if replay is not None:
        mixture = [{"path": data.train, "weight": 1 - REPLAY}, {"path": replay, "weight": REPLAY}]
        plan.tree["data"]["train"] = mixture
        plan.reasons.append(f"data.train: {REPLAY:.0%} of the pairs from {replay} (against forgetting)")
    batch = batch_size(data.samples, gpus)
    plan.set("batch.size", batch, f"about a sixteenth of {data.samples:,} pairs, a power of two from 32 to 1,024")
    plan.tree["batch"]["micro_batch"] = "auto"
    epochs = next((epochs for most, epochs in EPOCHS if data.samples <= most), 1)
    share = 1.0 if replay is None else 1 - REPLAY
    samples = max(int(epochs * data.samples / share) // batch, EVALUATIONS) * batch
    plan.set("run.samples", samples, f"{epochs} epochs of {data.samples:,} pairs")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole, why = (
        whole_or_adapter(plan, parameters, data.samples, gpus) if adapter is None else (not adapter, "asked for")
    )
    if whole:
        plan.reasons.append(f"model.lora: none ({why})")
        plan.set("model.rates", {"layer_decay": 0.8}, "lower layers, which hold general features, learn more slowly")
    else:
        plan.set("model.lora", {"rank": 16}, why)
    if model.family == "clip" and data.survey is not None and (data.survey.cut or 0) > CUT:
        plan.set(
            "model.num_tokens", LONG, f"{data.survey.cut:.0%} of captions are longer than {model.preprocess.num_tokens}"
        )
    plan.set("optim.lr", RATES["pretrained" if whole else "lora"], f"usual for {'whole towers' if whole else 'LoRA'}")
    plan.set("optim.warmup", 0.1, "short runs from a checkpoint start at a low rate")
    if model.head.logit_bias is not None:
        was, bias = model.head.logit_bias.item(), round(calibrated_bias(model, data.train, batch), 2)
        plan.set("model.bias", bias, f"minimizes the sigmoid loss of a batch of {batch:,}; the base has {was:.2f}")
    _evaluation(plan, data, label, general, samples)
    return plan


def batch_size(samples: int, gpus: int) -> int:
    """A power of two that the GPUs share, with sixteen batches an epoch where there are enough pairs."""
    size = BATCH[0]
    while size < BATCH[1] and 2 * size * 16 <= samples:
        size *= 2
    while size > samples:
        size //= 2
    return max(gpus, size - size % gpus)


def whole_or_adapter(plan: Plan, parameters: int, samples: int, gpus: int) -> tuple[bool, str]:
    """(whether to train whole towers, why)."""
    if parameters < SMALL_MODEL:
        return True, f"{parameters / 1e6:.1f} M parameters: an adapter would save nothing"
    if samples < FEW_PAIRS:
        return False, f"{samples:,} pairs are few for {parameters / 1e6:,.0f} M parameters"
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        if largest_micro_batch(plan.recipe(run={"samples": 10**9}), memory, gpus) < 4:
            return False, f"whole towers do not fit {memory / 2**30:.0f} GiB with four pairs at a time"
    return True, f"{samples:,} pairs are enough for all {parameters / 1e6:,.0f} M parameters"


def _evaluation(plan: Plan, data: Data, label: str | None, general: str | None, samples: int) -> None:
    paths = [data.validation, *([general] if general else [])]
    own, *others = prefixes(paths)
    plan.own = (f"{label}_top1",) if label else (f"{own}image_to_text_r1", f"{own}text_to_image_r1")
    plan.general = tuple(f"{prefix}{way}_r1" for prefix in others for way in ("image_to_text", "text_to_image"))
    plan.tree["eval"] = {"data": paths, "limit": 2000}
    if label:
        plan.tree["eval"]["zeroshot"] = [{"label": label, "data": data.validation}]
    batch = plan.tree["batch"]["size"]
    every = max(1, samples // EVALUATIONS // batch) * batch
    plan.set("eval.every", every, "ten evaluations on the held-out pairs, and one before the first step")
    plan.tree["checkpoint"] = {"every": every, "keep": 1}
    plan.set("checkpoint.best", list(plan.own), "the best checkpoint is exported, which may be the base")
    plan.set("eval.patience", 4, "the run ends after four evaluations in a row without a better one")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list):
        return " and ".join(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
