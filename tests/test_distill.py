"""Distillation: the divergence and the whole step against dense float64, real runs with a teacher, and what its
mistakes say."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GemmaTokenizer

from tests import test_train
from tests.support import dense_losses
from tests.support.dense_step import (
    Case,
    captured,
    dense_sigmoid,
    global_batch,
    local_slice,
    relative_errors,
    seed_rank,
)
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, curve, mistake, steps, stopped_at_step
from tests.support.tiny_models import letter_tokenizer, tiny_batch, tiny_model, tiny_settings
from trainer import config
from trainer.core import distributed
from trainer.core.types import Embeddings, UserError
from trainer.data import DataSettings
from trainer.distill import DistillSettings, TeacherModel, build_teacher, check_inputs
from trainer.losses import PairLoss, SigmoidLoss, SigmoidSettings, SoftmaxLoss, TaughtLoss
from trainer.losses.distill import AffinityLoss
from trainer.models import build
from trainer.plan.auto import teacher_of
from trainer.plan.memory import Job, forecast, loss_bytes
from trainer.plan.profile import look
from trainer.plan.search import zero_section
from trainer.runtime.signals import EXIT_AGAIN
from trainer.step import train_step

shards, recipe = test_train.shards, test_train.recipe
SIZES = ([17], [10, 7], [9, 12, 4])


def divergence(z: Embeddings, teacher: Embeddings) -> Tensor:
    """The mean of both directions' KL(teacher || student), all logits at once."""
    mine, theirs = dense_losses.logits(z), dense_losses.logits(teacher)
    rows, columns = ((theirs.softmax(d) * (theirs.log_softmax(d) - mine.log_softmax(d))).sum() for d in (1, 0))
    return (rows + columns) / (2 * len(mine))


class Lesson:
    """A loss whose teacher is known here, of another width and with a bias that must not matter; each rank takes its
    rows."""

    def __init__(self, loss: Any, teacher: Embeddings, sizes: list[int]) -> None:
        self.loss, self.teacher, self.sizes, self.traffic = loss, teacher, sizes, {}
        for part in loss.modules():
            if isinstance(part, PairLoss) and teacher.text.dtype == torch.float64:
                part.comm_gradient_dtype = torch.float64  # a recipe's gradients travel as float32 at most

    def __call__(self, z: Embeddings) -> Tensor:
        start = sum(self.sizes[: distributed.rank()])
        mine = slice(start, start + self.sizes[distributed.rank()])
        return self.loss(
            z._replace(teacher=self.teacher._replace(image=self.teacher.image[mine], text=self.teacher.text[mine]))
        )


def lesson_errors(
    loss: Any, reference: Any, sizes: list[int], dtype: torch.dtype, t: float = 10.0, seed: int = 0
) -> dict[str, float]:
    z = dense_losses.batch(sum(sizes), t=t, b=-3.0, dtype=dtype, near=0.5, seed=seed)
    z = z._replace(scale=z.scale.to(dtype), bias=z.bias.to(dtype))
    teacher = dense_losses.batch(sum(sizes), width=20, t=30.0, b=5.0, dtype=dtype, near=0.7, seed=seed + 50)
    exact = Embeddings(*(value.double() for value in teacher[:4]))
    return dense_losses.errors(
        lambda: Lesson(loss(), teacher, sizes), lambda truth: reference(truth, exact), [z], sizes
    )[0]  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize(
    ("dtype", "t", "limit"), [(torch.float64, 120.0, 1e-12), (torch.float32, 10.0, 1e-6), (torch.float32, 60.0, 1e-6)]
)
def test_the_divergence_and_its_gradients_are_the_dense_ones(
    sizes: list[int], dtype: torch.dtype, t: float, limit: float
) -> None:
    found = lesson_errors(lambda: AffinityLoss(tile_rows=5), divergence, sizes, dtype, t)
    assert max(found.values()) <= limit, found


@pytest.mark.parametrize("exchange", ["bidirectional", "gather"])
def test_other_exchanges_say_the_same(exchange: Any) -> None:
    found = lesson_errors(lambda: AffinityLoss(tile_rows=5, exchange=exchange), divergence, [9, 12, 4], torch.float64)
    assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("main", ["sigmoid", "softmax"])
def test_it_adds_to_the_main_loss_by_its_weight(main: str) -> None:
    def loss() -> TaughtLoss:
        return TaughtLoss(
            SigmoidLoss(tile_rows=5) if main == "sigmoid" else SoftmaxLoss(tile_rows=5),
            2.5,
            SigmoidSettings(tile_rows=5),
        )

    found = lesson_errors(
        loss,
        lambda z, teacher: getattr(dense_losses, main)(z) + 2.5 * divergence(z, teacher),
        [9, 12, 4],
        torch.float64,
    )
    assert max(found.values()) <= 1e-12, found


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn() -> None:
    z = dense_losses.take(dense_losses.batch(23, b=0.0), [23], 0)
    loss = AffinityLoss(tile_rows=5)(z._replace(teacher=Embeddings(*(value.detach() for value in z[:4]))))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert z.image.grad is not None and z.image.grad.norm() < 1e-6
    with torch.no_grad():
        assert (
            AffinityLoss()(
                z._replace(teacher=Embeddings(*(value.detach() for value in dense_losses.batch(23, seed=3)[:4])))
            )
            > 0.01
        )


def test_a_loss_without_its_teacher_says_so() -> None:
    z = dense_losses.batch(6)
    with pytest.raises(UserError, match=r"needs Embeddings\.teacher"):
        AffinityLoss()(z)
    with pytest.raises(UserError, match="are not those of 6 pairs"):
        AffinityLoss()(z._replace(teacher=dense_losses.batch(5)))


WEIGHT = 1.5


def tiny_teacher() -> Any:
    """Wider than the student, and it would drop half of its attention if it were in training mode."""
    return tiny_model("siglip", seed=11, width=48, dropout=0.5)


def taught_steps(case: Case, micro_batches: list[int | None]) -> list[tuple[float, dict[str, Tensor]]]:
    engine, teacher = case.engine(), TeacherModel(tiny_teacher(), "tiny")
    loss = TaughtLoss(SigmoidLoss(tile_rows=3), WEIGHT, SigmoidSettings(tile_rows=3))
    batch = local_slice(global_batch(case.rows))
    found = []
    for rows in micro_batches:
        seed_rank(distributed.rank())
        result = train_step(engine, batch, loss, rows, teacher=teacher)
        found.append((result.loss, captured(engine)))
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_the_gradient_of_a_step_is_the_dense_one(stage: int) -> None:
    """At 2 ranks, in one pass and in micro-batches that do not divide the local batch."""
    case, batch = Case(stage=stage), global_batch(16)
    model, teacher = case.model().double().train(), tiny_teacher().double().eval()
    with patch.object(torch.Tensor, "float", torch.Tensor.double):  # the model's own .float() would round embeddings
        z, taught = model(*batch[:3]), teacher(*batch[:3])
    wanted_loss = dense_sigmoid(*z[:4]) + WEIGHT * divergence(z, Embeddings(*(value.detach() for value in taught[:4])))
    wanted_loss.backward()
    wanted = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss, found in run_ranks(taught_steps, 2, case, [None, 3, 4])[0]:
        assert loss == pytest.approx(wanted_loss.item(), rel=1e-5)
        assert max(relative_errors(found, wanted).values()) <= 1e-5


def test_a_teacher_draws_no_random_numbers_and_no_gradient() -> None:
    teacher, batch = TeacherModel(tiny_teacher(), "tiny"), tiny_batch(7)
    before = torch.get_rng_state()
    whole, pieces = teacher(batch, 7), teacher(batch, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(value.requires_grad for value in whole[:4])
    for one, other in zip(whole[:4], pieces[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    rounded = TeacherModel(tiny_teacher(), "tiny", precision="bf16")(batch, 7)
    assert rounded.image.dtype == torch.float32
    assert 1e-6 < (rounded.image - whole.image).abs().max() < 0.05


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in ((11, "one"), (12, "other")):
        tiny_model("siglip", seed=seed, width=48).save_pretrained(folder / name)
    tiny_model("clip", seed=13).save_pretrained(folder / "clip")
    return folder


def test_a_run_learns_from_its_teacher_and_goes_on_with_it(recipe: Path, tmp_path: Path, teachers: Path) -> None:
    taught = [f"distill.teacher={teachers / 'one'}", "distill.weight=4"]
    whole = f"run.directory={tmp_path / 'whole'}"
    assert run_ranks(call, 2, recipe, *taught, whole) == [0, 0]
    assert run_ranks(stopped_at_step, 2, 4, recipe, *taught) == [EXIT_AGAIN] * 2
    moved = shutil.copytree(teachers / "one", tmp_path / "moved")
    text = run_ranks(mistake, 2, recipe, f"distill.teacher={teachers / 'other'}")[0]
    assert (
        "is not the teacher that this run started with" in text and str(teachers / "one") in text and "\n" not in text
    )
    assert run_ranks(call, 2, recipe, f"distill.teacher={moved}", taught[1]) == [0, 0]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    onward = [f"checkpoint.resume={tmp_path / 'run'}", f"run.directory={tmp_path / 'onward'}"]
    assert run_ranks(call, 2, recipe, f"distill.teacher={teachers / 'other'}", *onward) == [
        0,
        0,
    ]  # another run may have another
    losses = [line["loss"] for line in steps(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["distill"]["teacher"] == str(moved)
    saved = (tmp_path / "run" / "checkpoints" / "samples-000000160" / "model.safetensors").stat().st_size
    assert saved < 4.2 * sum(p.numel() for p in build(tiny_settings()).parameters()) + 10_000  # the student alone


@pytest.mark.parametrize("joins", [True, False])
def test_a_teacher_that_joins_or_leaves_does_not_hide_the_queue(
    recipe: Path, tmp_path: Path, teachers: Path, joins: bool
) -> None:
    """A teacher of hardly any weight: with the queue as it was left, the curve is that of a run without one."""
    queue = ["loss={name: queue, size: 40, width: 32}", "optim.eps=1e-4", "engine.ds_config=zero1"]
    taught = [*queue, f"distill.teacher={teachers / 'one'}", "distill.weight=1e-9"]
    assert run_ranks(call, 2, recipe, *queue, f"run.directory={tmp_path / 'whole'}") == [0, 0]
    before, after = (queue, taught) if joins else (taught, queue)
    assert run_ranks(stopped_at_step, 2, 4, recipe, *before) == [EXIT_AGAIN] * 2
    assert run_ranks(call, 2, recipe, *after) == [0, 0]
    assert np.abs(np.array(curve(tmp_path / "run")) / np.array(curve(tmp_path / "whole")) - 1).max() < 1e-4
    saved = load_file(tmp_path / "run" / "checkpoints" / "samples-000000160" / "loss.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {"queue": (40, 32), "taken": ()}
    assert saved["taken"] == 160


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distill.teacher=/nowhere/teacher"], "distill.teacher '/nowhere/teacher'"),
        (["distill.teacher=TEACHERS/one", "distill.weight=0"], "'distill.weight'"),
        (["distill.weight=2"], "teacher: name one"),
        (["distill.teacher=TEACHERS/clip"], "needs images resized by crop, but the student's are squash"),
        (["distill.teacher=TEACHERS/one", "model.num_tokens=6"], "set model.num_tokens=8"),
        (["distill.teacher=TEACHERS/one", "model.image_size=24"], "set model.image_size=16"),
    ],
)
def test_mistakes_end_in_one_line(recipe: Path, teachers: Path, overrides: list[str], says: str) -> None:
    text = run_ranks(mistake, 1, recipe, *(one.replace("TEACHERS", str(teachers)) for one in overrides))[0]
    assert says in text and "\n" not in text


def test_a_teacher_sees_what_the_student_sees(teachers: Path) -> None:
    """Another tokenizer is refused; another mean is not, because each model normalises the bytes itself."""
    student = build(tiny_settings()).preprocess
    letters = build(tiny_settings().model_copy(update={"tokenizer": letter_tokenizer(GemmaTokenizer)})).preprocess
    with pytest.raises(UserError, match="has another tokenizer than the student"):
        check_inputs("teacher", letters, student)
    check_inputs("teacher", student, dataclasses.replace(student, mean=(0.1, 0.2, 0.3)))
    batch = tiny_batch(5)
    truth = build(DistillSettings(teacher=str(teachers / "one")).model).eval()
    taught = build_teacher(DistillSettings(teacher=str(teachers / "one")), student, "fp32", DataSettings())(batch, 2)
    torch.testing.assert_close(taught.image, normalize(truth.embed_images(batch.pixels)).detach(), rtol=0, atol=1e-6)


def test_stored_embeddings_show_a_teacher_nothing(recipe: Path, teachers: Path) -> None:
    stored = [f"model={{path: {teachers / 'one'}, lock: {{image: true}}, precomputed: {{image: tiny}}}}"]
    text = run_ranks(mistake, 1, recipe, *stored, f"distill.teacher={teachers / 'other'}")[0]
    assert "take model.precomputed out" in text


def test_the_planner_counts_the_teacher(teachers: Path, recipe: Path) -> None:
    taught = config.load(recipe, [f"distill.teacher={teachers / 'one'}"])
    student = look(taught.model, "fp32", "cpu")
    alone = Job(2, 64, 16, loss=taught.loss)
    for precision, least, most in (("fp32", 4.0, 4.1), ("bf16", 2.0, 3.6)):
        teacher = teacher_of(taught, precision, "cpu")
        assert teacher is not None
        held = TeacherModel(build(taught.distill.model), "one", precision).model if taught.distill else None
        assert held is not None and teacher.parameters == sum(p.nbytes for p in held.parameters())
        assert least <= teacher.parameters / teacher.count <= most
        job = dataclasses.replace(alone, teacher=teacher)
        with_teacher, without = (forecast(student, zero_section("zero1"), one).total for one in (job, alone))
        assert with_teacher - without >= teacher.parameters
        assert loss_bytes(32, job, "cpu") > loss_bytes(32, alone, "cpu")
    assert teacher_of(config.load(recipe), "fp32", "cpu") is None
