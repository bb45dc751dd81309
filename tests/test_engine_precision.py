"""fp16 and bf16 round in the towers alone; fp16's loss scale loses no batch, is exact to undo, and goes on where it
was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.dense_step import (
    Case,
    GatheredSigmoid,
    Pieces,
    captured,
    global_batch,
    local_slice,
    reference,
    seed_rank,
    weights,
)
from tests.support.forked_ranks import run_ranks
from trainer.core import distributed
from trainer.core.types import UserError
from trainer.engine import precision
from trainer.engine.precision import LossScale, find_overflow, keep_float32, require_float32
from trainer.step import StepResult, train_step

ROUNDING = {"fp16": 4e-3, "bf16": 3e-2}
"""Largest distance from float64: a few roundings of 11 and 8 bits in each of the tiny model's layers."""


def gradients(case: Case, kind: str, pieces: list[Pieces]) -> tuple[list[dict[str, Tensor]], set[torch.dtype]]:
    engine = case.engine(precision=kind)
    met: set[torch.dtype] = set()
    engine.module.towers.text_model.encoder.layers[0].mlp.fc1.register_forward_hook(
        lambda module, inputs, output: met.add(output.dtype)
    )
    found = []
    for data_seed, (micro_batch, grad_reduction) in enumerate(pieces):
        seed_rank(distributed.rank())
        batch = local_slice(global_batch(case.rows, data_seed))
        train_step(engine, batch, GatheredSigmoid(), micro_batch, grad_reduction=grad_reduction)
        found.append(captured(engine))
    return found, met


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted| over all parameters together."""
    assert found.keys() == wanted.keys()
    size = sum(float(gradient.double().square().sum()) for gradient in wanted.values()) ** 0.5
    return sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted) ** 0.5 / size


def check_rounding(case: Case, world: int, pieces: list[Pieces], kind: str) -> None:
    found, met = run_ranks(gradients, world, case, kind, pieces, timeout=180)[0]
    assert met == {precision.DTYPES[kind]}
    head = ["head.logit_scale", "head.logit_bias"]
    for seed, (piece, one) in enumerate(zip(pieces, found, strict=True)):
        _, exact = reference(case, world, piece.micro_batch, seed)
        off = distance(one, exact), distance({n: one[n] for n in head}, {n: exact[n] for n in head})
        print(
            f"ZeRO-{case.stage}, {world} rank(s), {piece}, lora {case.lora}: {off[0]:.1e}, scale and bias {off[1]:.1e}"
        )
        assert 1e-5 < off[0] < ROUNDING[kind]
        assert off[1] < ROUNDING[kind]


ONE_PASS, TWO_PASSES = Pieces(None), Pieces(2)


@pytest.mark.parametrize(
    ("case", "world"),
    [
        (Case(stage=0), 2),
        (Case(stage=1, lora=True), 1),
        (Case(stage=2, offload="optimizer"), 2),
        (Case(stage=3, lora=True, recompute="all"), 2),
    ],
    ids=str,
)
def test_fp16_rounds_in_the_towers_alone(case: Case, world: int) -> None:
    check_rounding(case, world, [ONE_PASS, TWO_PASSES], "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_matrix_of_stages_ranks_passes_and_adapters(stage: int, world: int, lora: bool, kind: str) -> None:
    pieces = [ONE_PASS, TWO_PASSES, Pieces(4, "per_micro_batch")]
    check_rounding(Case(stage=stage, lora=lora), world, pieces, kind)
    if stage:
        check_rounding(Case(stage=stage, lora=lora, offload="optimizer"), world, pieces, kind)


def at_scale(stage: int, scale: float) -> dict[str, Tensor]:
    engine = Case(stage=stage).engine(precision="fp16")
    assert engine.loss_scale is not None
    engine.loss_scale.value = scale
    train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 4)
    return captured(engine)


def test_the_scale_shows_in_no_gradient_unless_numbers_are_too_small_for_float16() -> None:
    """Powers of two: the same bits from 2^12 to 2^16; without a scale small gradients are lost."""
    found = {scale: run_ranks(at_scale, 1, 1, scale)[0] for scale in (1.0, 2.0**12, 2.0**16)}
    _, exact = reference(Case(), 1, 4)
    off = {scale: distance(gradient, exact) for scale, gradient in found.items()}
    print("distance from float64 by scale:", off)
    assert distance(found[2.0**12], found[2.0**16]) < 0.2 * off[2.0**16]
    assert off[1.0] > off[2.0**16]
    for name in ("head.logit_scale", "head.logit_bias"):
        assert torch.equal(found[1.0][name], found[2.0**16][name])


class Overflow:
    """On rank 1, the gradient of one layer becomes infinite in the given steps while the scale is above ``limit``."""

    def __init__(self, layer: nn.Module, scale: LossScale, limit: float) -> None:
        self.scale, self.limit, self.armed = scale, limit, False
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.armed and distributed.rank() == 1 and output.requires_grad:
            output.register_hook(self.overflow)

    def overflow(self, gradient: Tensor) -> Tensor:
        return gradient * float("inf") if self.scale.value > self.limit else gradient


def trained(stage: int, offload: str, piece: Pieces, overflows: bool) -> dict[str, Any]:
    """Three steps with dropout; in the second, rank 1 overflows above half the scale."""
    case = Case(stage=stage, offload=offload, dropout=0.2)
    engine = case.engine(lambda parameters: torch.optim.SGD(parameters, lr=0.5), precision="fp16", clip=0.5)
    assert engine.loss_scale is not None
    if not overflows:
        engine.loss_scale.value /= 4  # the same scale throughout: the same bits
    fault = Overflow(engine.module.towers.text_model.encoder.layers[1].mlp.fc1, engine.loss_scale, 2.0**14)
    results: list[StepResult] = []
    for step in range(3):
        fault.armed = overflows and step == 1
        seed_rank(10 * step + distributed.rank())
        batch = local_slice(global_batch(16, step))
        results.append(
            train_step(engine, batch, GatheredSigmoid(), piece.micro_batch, grad_reduction=piece.grad_reduction)
        )
    return {
        "results": results,
        "weights": weights(engine),
        "scale": engine.loss_scale.value,
        "overflows": engine.loss_scale.num_overflows,
        "next number": torch.rand(1).item(),
    }


@pytest.mark.parametrize(
    ("stage", "offload", "piece"),
    [
        (0, "", TWO_PASSES),
        (1, "", ONE_PASS),
        (2, "optimizer", Pieces(4, "per_micro_batch")),
        pytest.param(2, "", Pieces(4, "per_micro_batch"), marks=pytest.mark.slow),
        (3, "", ONE_PASS),
        pytest.param(3, "", TWO_PASSES, marks=pytest.mark.slow),
    ],
)
def test_an_overflow_on_one_rank_loses_no_batch(stage: int, offload: str, piece: Pieces) -> None:
    """The same curve and weights as with the lower scale from the start, dropout's numbers included."""
    broken = run_ranks(trained, 2, stage, offload, piece, True, timeout=180)
    whole = run_ranks(trained, 2, stage, offload, piece, False, timeout=180)
    for one, other in zip(broken, whole, strict=True):
        assert (one["overflows"], other["overflows"]) == (2, 0)
        assert one["scale"] == other["scale"] == 2.0**14
        assert one["next number"] == other["next number"]
        for a, b in zip(one["results"], other["results"], strict=True):
            assert not a.skipped and not b.skipped
            assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    assert distance(broken[0]["weights"], whole[0]["weights"]) < 1e-6


def beyond_any_scale() -> tuple[StepResult, float, str]:
    """A step that overflows at any scale, the scale after it, and why the next was skipped."""
    engine = Case(stage=1).engine(precision="fp16")
    assert engine.loss_scale is not None
    fault = Overflow(engine.module.towers.text_model.encoder.layers[1].mlp.fc1, engine.loss_scale, 0.0)
    fault.armed = True
    bad = train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 4)
    fault.armed, scale = False, engine.loss_scale.value
    good = train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 4)
    return bad, scale, good.skipped


def test_a_gradient_that_no_scale_makes_finite_is_skipped_and_leaves_the_scale() -> None:
    for bad, scale, skipped in run_ranks(beyond_any_scale, 2):
        assert bad.skipped == "not finite" and bad.grad_norm == float("inf")
        assert scale == precision.FIRST_SCALE and skipped == ""


def test_the_scale_grows_after_good_steps_and_is_restored_with_its_count() -> None:
    scale = LossScale(8.0, good_steps=3)
    assert scale.lower() and scale.value == 4.0
    for _ in range(2):
        scale.end_step(finite=True)
    resumed = LossScale(good_steps=3)
    resumed.load_state_dict(scale.state_dict())
    for one in (scale, resumed):
        one.end_step(finite=True)
        assert (one.value, one.num_overflows) == (8.0, 1)
    scale.end_step(finite=False)
    assert scale.value == 8.0
    while scale.lower():
        pass
    assert scale.value == precision.LEAST_SCALE
    scale.end_step(finite=False)
    assert scale.value == 8.0


def true_norm() -> float:
    engine = Case(stage=1, dropout=0.2).engine(lambda parameters: torch.optim.SGD(parameters, lr=0.5), clip=0.5)
    seed_rank(0)
    return train_step(engine, global_batch(16), GatheredSigmoid(), None).grad_norm


def test_clipping_and_the_guard_meet_true_gradients() -> None:
    found = run_ranks(trained, 1, 1, "", ONE_PASS, False)[0]["results"][0].grad_norm
    assert found == pytest.approx(run_ranks(true_norm, 1)[0], rel=ROUNDING["fp16"])


def overflowing(keep: tuple[str, ...]) -> tuple[str, str]:
    case = Case(stage=1)
    model = case.model()
    with torch.no_grad():
        model.towers.text_model.encoder.layers[1].mlp.fc2.bias.fill_(1e5)
    keep_float32(model, keep)
    engine = case.engine(precision="fp16", model=model)
    assert engine.module is model
    result = train_step(engine, local_slice(global_batch(16)), GatheredSigmoid(), 4)
    with engine.find_overflow() as found, torch.no_grad():
        batch = local_slice(global_batch(16))
        engine.forward(batch.pixels, batch.tokens, batch.token_mask)
    return result.skipped, ", ".join(found)


def test_a_layer_beyond_float16_is_named_and_can_be_kept_in_float32(capfd: pytest.CaptureFixture[str]) -> None:
    layer = "towers.text_model.encoder.layers.1.mlp.fc2"
    assert set(run_ranks(overflowing, 2, ())) == {("not finite", layer)}
    assert f"fp16 overflows in {layer}" in capfd.readouterr().err
    assert set(run_ranks(overflowing, 2, (r"text_model\..*\.fc2$",))) == {("", "")}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="matches no module; names look like towers"):
        keep_float32(Case().model(), ("no_such_layer",))
    with pytest.raises(UserError, match="not a valid regular expression"):
        keep_float32(Case().model(), ("(",))


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"),
    [(True, (8, 0), "bf16"), (False, (7, 0), "fp16"), (False, (7, 5), "fp16"), (False, (6, 1), "fp32")],
)
def test_auto_takes_what_the_gpu_has_units_for(
    bf16: bool, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert precision.best_precision() == expected


def fp32_settings() -> list[str]:
    Case().engine(precision="fp32")
    backends: Any = torch.backends
    return [o.fp32_precision for o in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]


def test_fp32_means_float32_in_convolutions_too() -> None:
    assert run_ranks(fp32_settings, 1)[0] == ["ieee"] * 3


def test_older_code_may_still_ask_about_tf32() -> None:
    require_float32()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_find_overflow_leaves_the_model_as_it_was() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    with find_overflow(layer) as found:
        layer(torch.full((1, 2), float("nan")))
    assert not found and not layer[0]._forward_hooks
