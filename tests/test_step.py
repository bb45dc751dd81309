"""The two-pass step on real ranks: its gradient is that of one dense float64 computation, whatever the pieces."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import nn
from torch.nn.functional import normalize

from tests.support.dense_step import Case, GatheredSigmoid, Pieces, captured, global_batch, gradient_errors, local_slice
from tests.support.forked_ranks import run_ranks
from trainer.models.adapt.mask import MaskSettings
from trainer.step import train_step

EXACT = 1e-5
WHOLE = Pieces(None)
"""A local batch in one pass."""


def check(case: Case, world: int, pieces: list[Pieces], timeout: float = 60.0) -> None:
    errors = gradient_errors(case, world, pieces, timeout)
    worst = max(errors, key=lambda name: errors[name])
    print(f"worst of {case} on {world} ranks: {worst}: {errors[worst]:.1e}")
    assert errors[worst] <= EXACT, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_equals_dense_float64(stage: int) -> None:
    """One engine, one step after the other: what a step leaves in ZeRO's buffers must not reach the next."""
    check(
        Case(stage=stage),
        2,
        [
            WHOLE,
            Pieces(4),
            Pieces(3),
            Pieces(3, "per_micro_batch"),
            Pieces(4, "per_micro_batch"),
            Pieces(2),
            Pieces(None, "per_micro_batch"),
        ],
    )


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 3), (4, 0), (4, 2), (4, 3)])
def test_any_number_of_ranks(world: int, stage: int) -> None:
    check(Case(stage=stage), world, [Pieces(2), Pieces(2, "per_micro_batch")])


PAIRWISE = [
    Case(stage=0, dropout=0.2, recompute="all"),
    Case(stage=1, dropout=0.2, lora=True, kind="clip"),
    Case(stage=1, offload="optimizer", recompute=2),
    Case(stage=2, offload="optimizer", dropout=0.2, recompute="all"),
    Case(stage=2, kind="clip", recompute="all", lora=True),
    Case(stage=3, offload="optimizer", dropout=0.2),
    Case(stage=3, offload="optimizer parameters", recompute="all", lora=True),
    Case(stage=3, dropout=0.2, recompute=2, kind="clip"),
]


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_dropout_recomputation_adapters_and_offload(case: Case) -> None:
    """Every pair of these appears; the slow matrix has every combination."""
    check(case, 2, [Pieces(4), Pieces(4, "per_micro_batch"), WHOLE])


@pytest.mark.parametrize(("kind", "kept"), [("siglip", "random"), ("clip", "block")])
def test_patches_and_tokens_left_out(kind: str, kept: Any) -> None:
    """Pass 2 leaves out what pass 1 left out."""
    check(
        Case(stage=1, kind=kind, mask=MaskSettings(drop=0.5, tokens=3, tokens_kept=kept)),
        2,
        [Pieces(4), Pieces(3), WHOLE],
    )


@pytest.mark.parametrize(
    ("stage", "locked"), [(0, "towers"), (2, "towers.vision_model"), (3, "towers.text_model"), (3, "towers")]
)
def test_locked_towers(stage: int, locked: str) -> None:
    """The locked tower draws dropout masks in pass 1 and is left out of pass 2; with both locked, scale and bias still
    learn."""
    check(Case(stage=stage, locked=locked, dropout=0.2), 2, [Pieces(4), Pieces(4, "per_micro_batch")])


class SometimesMore(nn.Module):
    """A dual encoder with a layer that only some steps use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Case().model()
        self.extra = nn.Linear(self.inner.embed_dim, self.inner.embed_dim)
        self.more = True

    def forward(self, *inputs: Any) -> Any:
        z = self.inner(*inputs)
        return z._replace(image=normalize(self.extra(z.image), dim=-1)) if self.more and len(z.image) else z


def unused_later(case: Case, grad_reduction: Any) -> list[float]:
    """Norm of the extra layer's gradient in steps with, without, and with it."""
    engine = case.engine(model=SometimesMore())
    norms = []
    for more in (True, False, True):
        engine.module.more = more
        train_step(engine, local_slice(global_batch(8)), GatheredSigmoid(), 2, grad_reduction=grad_reduction)
        norms.append(
            sum(float(gradient.norm()) for name, gradient in captured(engine).items() if name.startswith("extra."))
        )
    return norms


UNUSED = [
    (0, "", "per_step"),
    (1, "optimizer", "per_step"),
    (2, "", "per_step"),
    (2, "", "per_micro_batch"),
    (2, "optimizer", "per_micro_batch"),
    (3, "", "per_step"),
    (3, "", "per_micro_batch"),
]


@pytest.mark.parametrize(
    ("stage", "offload", "grad_reduction"), [*UNUSED, (3, "optimizer", "per_step"), (3, "optimizer", "per_micro_batch")]
)
def test_what_a_step_does_not_use_has_no_gradient(stage: int, offload: str, grad_reduction: str) -> None:
    """ZeRO's buffers still hold what it had one step ago."""
    first, second, third = run_ranks(unused_later, 2, Case(stage=stage, offload=offload), grad_reduction)[0]
    assert first > 0
    assert second == 0
    assert third == pytest.approx(first, rel=1e-5)


def tower_passes(case: Case) -> tuple[int, int]:
    """How often (image, text) towers ran in one step of four micro-batches."""
    engine = case.engine()
    train_step(engine, local_slice(global_batch(case.rows)), GatheredSigmoid(), 2)  # learns what is locked
    passes = {"vision_model": 0, "text_model": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            passes[name] += 1

        return hook

    for name in passes:
        getattr(engine.module.towers, name).register_forward_hook(count(name))
    train_step(engine, local_slice(global_batch(case.rows)), GatheredSigmoid(), 2)
    return passes["vision_model"], passes["text_model"]


def test_locked_towers_run_once_and_a_single_micro_batch_has_no_second_pass() -> None:
    cases = {
        Case(rows=8): (8, 8),
        Case(rows=8, locked="towers.vision_model"): (4, 8),
        Case(rows=8, locked="towers"): (4, 4),
        Case(rows=2): (1, 1),
    }
    for case, wanted in cases.items():
        assert run_ranks(tower_passes, 1, case) == [wanted], case


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_matrix_of_1024_pairs_in_micro_batches_of_32(stage: int, world: int) -> None:
    """ZeRO x ranks x recomputation x dropout x LoRA x offload."""
    offloads = {0: [""], 1: ["", "optimizer"], 2: ["", "optimizer"], 3: ["", "optimizer parameters"]}[stage]
    worst = {}
    for recompute, dropout, lora, offload in itertools.product(["none", "all"], [0.0, 0.1], [False, True], offloads):
        case = Case(stage=stage, rows=1024, recompute=recompute, dropout=dropout, lora=lora, offload=offload)  # type: ignore[arg-type]
        errors = gradient_errors(case, world, [Pieces(32)], timeout=600)
        worst[str(case)] = max(errors.items(), key=lambda item: item[1])
    for case_name, (name, error) in worst.items():
        print(f"{world} ranks {case_name}: {error:.1e} {name}")
    assert max(error for _, error in worst.values()) <= EXACT


def gradients_held(grad_reduction: Any, micro_batch: int | None) -> list[float]:
    """The share of all gradients that is held when a step at ZeRO-3 ends its backward passes, shards aside."""
    engine, held = Case(stage=3).engine(), []
    finish = engine.finish_gradients

    def look() -> float:
        parameters: list[Any] = [p for p in engine.module.parameters() if p.requires_grad]
        whole = sum(p.grad.numel() for p in parameters if p.grad is not None)
        held.append(whole / sum(p.ds_numel for p in parameters))
        return finish()

    engine.finish_gradients = look  # type: ignore[method-assign]
    train_step(engine, global_batch(8), GatheredSigmoid(), micro_batch, grad_reduction=grad_reduction)
    return held


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_zero3_never_holds_all_gradients(micro_batch: int | None) -> None:
    assert run_ranks(gradients_held, 1, "auto", micro_batch) == [[0.0]]
    assert run_ranks(gradients_held, 1, "per_step", micro_batch) == [[1.0]]  # so that this is a test of something
