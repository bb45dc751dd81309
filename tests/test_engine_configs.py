"""Every file in ds_configs/ trains the same weights: AdamW, decay, clipping and schedule against plain torch in one
process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.dense_step import (
    Case,
    GatheredSigmoid,
    captured,
    dense_sigmoid,
    global_batch,
    local_slice,
    reference,
    weights,
)
from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import tiny_model
from trainer.engine import EngineSettings, build_engine
from trainer.engine.ds_config import FOLDER
from trainer.models.adapt.recompute import recompute
from trainer.optim import AdamWSettings, build_optimizer, learning_rate
from trainer.step import train_step

ROWS, STEPS, CLIP = 8, 3, 0.5
OPTIM = AdamWSettings(
    lr=1e-2, weight_decay=0.1, eps=1e-3, warmup=0, clip=CLIP
)  # eps: AdamW else makes steps of mere rounding
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def wide_model() -> nn.Module:
    """Some of its parameters are larger than what ZeRO-3 leaves whole (stage3_param_persistence_threshold)."""
    model = tiny_model(layers=1, width=256)
    assert max(parameter.numel() for parameter in model.parameters()) > 100_000
    return model


def rate(step: int) -> float:
    return learning_rate(OPTIM, step * ROWS, STEPS * ROWS)


def through_engine(name: str, precision: str, layers: str) -> dict[str, Tensor]:
    model = wide_model()
    recompute(model.towers.vision_model, layers, offload=True)  # type: ignore[arg-type]
    settings = EngineSettings(ds_config=name, precision=precision)  # type: ignore[arg-type]
    engine = build_engine(model, build_optimizer(model, OPTIM), settings, clip=CLIP)
    for step in range(STEPS):
        engine.set_learning_rate(rate(step))
        train_step(engine, local_slice(global_batch(ROWS, step)), GatheredSigmoid(), 2)
    return weights(engine)


def through_torch() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, in float64."""
    model = wide_model().double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OPTIM)
    for step in range(STEPS):
        batch = global_batch(ROWS, step)
        z = model(batch.pixels, batch.tokens, batch.token_mask)
        loss = dense_sigmoid(z.image.double(), z.text.double(), z.scale.double(), z.bias.double())
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return before, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def wanted() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return through_torch()


def test_the_promised_files_are_there_and_explained() -> None:
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_params"} <= set(NAMES)
    readme = (FOLDER / "README.md").read_text()
    assert all(f"**{name}**" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_ds_config_never_changes_the_weights(name: str, wanted: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    before, after = wanted
    found = run_ranks(through_engine, 2, name, "fp32", "all" if "3" in name else "none", timeout=180)[0]
    moved = {n: float((after[n] - before[n]).norm()) for n in after}
    errors = {
        n: float((found[n].double() - after[n]).norm()) / max(moved[n], 1e-2 * max(moved.values())) for n in after
    }
    worst = max(errors, key=lambda n: errors[n])
    print(f"{name}: {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, (worst, errors[worst])


def bf16_gradients(stage: int) -> tuple[dict[str, Tensor], set[torch.dtype]]:
    engine = Case(stage=stage).engine(precision="bf16")
    met: set[torch.dtype] = set()
    engine.module.towers.text_model.encoder.layers[0].mlp.fc1.register_forward_hook(
        lambda module, inputs, output: met.add(output.dtype)
    )
    train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 2)
    return captured(engine), met


def test_bf16_rounds_in_the_towers_alone() -> None:
    """What is summed over micro-batches and ranks is float32 at every stage: nothing but the towers' own rounding is
    lost."""
    _, exact = reference(Case(), 2, 2)
    found = {stage: run_ranks(bf16_gradients, 2, stage, timeout=180)[0] for stage in (0, 1, 2, 3)}
    size = sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((one[n].double() - other[n].double()).square().sum()) for n in one) ** 0.5 / size

    rounding = {stage: distance(gradients, exact) for stage, (gradients, _) in found.items()}
    print("distance from float64 by stage:", rounding)
    assert all(met == {torch.bfloat16} for _, met in found.values())
    assert 1e-4 < rounding[0] < 3e-2
    for stage in (1, 2):
        assert distance(found[stage][0], found[0][0]) < 1e-6
    assert rounding[3] < 1.1 * rounding[0]  # DeepSpeed's own linear layer adds the bias after rounding


def stage(name: str) -> int:
    model = tiny_model(layers=1)
    return build_engine(
        model, build_optimizer(model, OPTIM), EngineSettings(ds_config=name, precision="fp32")
    ).zero_stage


@pytest.mark.parametrize(
    ("name", "ranks", "wanted_stage"), [("auto", 1, 0), ("auto", 2, 1), ("zero1", 1, 1), ("zero2", 2, 2)]
)
def test_auto_partitions_only_where_there_is_another_rank(name: str, ranks: int, wanted_stage: int) -> None:
    assert run_ranks(stage, ranks, name) == [wanted_stage] * ranks
