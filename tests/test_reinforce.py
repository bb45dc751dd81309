"""A teacher's embeddings of views and captions stored beside the shards, and training on them: the same loss and
gradients as running the teacher on the same views."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from data_tools.commands import filter as filter_verb
from data_tools.format.columns import amended_columns
from data_tools.format.index import Dataset
from data_tools.format.view import write_column
from data_tools.io.output import Output
from tests.support import dense_losses
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, curve, make_shards, mistake, steps, stopped_at_step
from tests.support.shards import overwrite
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_model, tiny_tokenizer
from trainer import config, distill, embed
from trainer import run as runs
from trainer.core import distributed
from trainer.core.types import Batch, Embeddings, UserError
from trainer.data import build_loader, embedding_column
from trainer.data.stored_teacher import TeacherWriter
from trainer.distill import StoredTeacher, TeacherModel, load_teacher
from trainer.losses import SigmoidLoss, SigmoidSettings, TaughtLoss
from trainer.models import build
from trainer.runtime.signals import EXIT_AGAIN

ROWS, DAMAGED, VIEWS, CAPTIONS = 80, 7, 3, ["txt", "other"]
TAUGHT = ["distill.stored=views"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a damaged image and two captions a pair, two teachers, and a recipe that crops, flips and recolours;
    the teachers' columns in fp16 (written by two ranks) and of one of them in fp32."""
    folder = tmp_path_factory.mktemp("reinforced")
    shards = make_shards(folder / "pairs", tiny_captions(ROWS))
    overwrite(shards, 0, DAMAGED)
    for seed, width, name in ((11, 48, "one"), (12, 32, "two"), (13, 48, "other")):
        tiny_model("siglip", seed=seed, width=width).save_pretrained(folder / name)
    tiny_model("clip", seed=3).save_pretrained(folder / "clip")
    tree: dict[str, Any] = {
        "run": {"samples": 160},
        "model": {"config": tiny_config(dropout=0.1), "tokenizer": tiny_tokenizer()},
        "data": {
            "train": str(shards),
            "workers": 0,
            "augment": {"crop_scale": [0.3, 0.9], "flip": 0.5, "randaugment": 1},
            "caption": CAPTIONS,
        },
        "batch": {"size": 16, "micro_batch": 4},
        "optim": {"lr": 2e-3, "eps": 1e-4},
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000},
        "checkpoint": {"every": 64},
        "eval": {"every": 0},
        "distill": {"weight": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    join_captions(shards, tiny_captions(ROWS, seed=5))
    assert run_ranks(embed.main, 2, embedding(folder, "one", "views")) == [0, 0]
    for teachers, name, *options in (
        (f"[{folder}/one,{folder}/two]", "both"),
        (str(folder / "one"), "exact", "--storage", "fp32", "--batch-size", "1"),
    ):
        assert run_ranks(embed.main, 1, embedding(folder, teachers, name, *options)) == [0]
    return folder


def join_captions(shards: Path, captions: list[str]) -> None:
    """A second caption of every sample, as `data_tools join` would add it."""
    output = Output(str(shards))
    output.start()
    with amended_columns(Dataset.open(shards)) as entries:
        entries["other"] = write_column(output, "other", captions)


def embedding(world: Path, teacher: str, name: str, *options: str) -> list[str]:
    """The arguments of `python -m trainer.embed`."""
    path = teacher if "/" in teacher else str(world / teacher)
    given = ["--views", str(VIEWS), *options]
    return [str(world / "recipe.yaml"), f"distill.teacher={path}", f"distill.stored={name}", *given]


def rows_of(recipe: Path, overrides: list[str], rank: int, world: int, seen: int, count: int) -> list[Batch]:
    """Batches of a rank, copied."""
    settings = config.load(recipe, overrides)
    preprocess = build(settings.model).preprocess
    stored = settings.distill.stored if settings.distill else None
    with build_loader(settings.data, preprocess, 16, rank, world, settings.run.seed, seen, stored) as loader:
        return [Batch(*(field.clone() for field in next(loader))) for _ in range(count)]


def as_bytes(batch: Batch) -> list[bytes]:
    return [field.numpy().tobytes() for field in batch]


def teacher_on(batch: Batch, path: Path, rows: int) -> tuple[Tensor, Tensor]:
    """The teacher's embeddings of what the student sees in a batch."""
    model = tiny_saved(path)
    with torch.inference_mode():
        parts = [(model.embed_images(p.pixels), model.embed_texts(p.tokens, p.token_mask)) for p in batch.split(rows)]
    image, text = (torch.cat(column) for column in zip(*parts, strict=True))
    return image, text


def tiny_saved(path: Path) -> Any:
    return load_teacher(str(path)).eval()


def test_the_stored_rows_are_what_the_teacher_makes_of_the_batch(world: Path) -> None:
    """Ten batches, two epochs: a float32 column holds the very numbers (a row at a time on both sides, since a matrix
    product of more rows may round otherwise); a float16 column is off by at most half a unit in the last place, 2^-11
    of each number, or 2^-25 below float16's smallest normal one."""
    recipe = world / "recipe.yaml"
    exact, half = (rows_of(recipe, [f"distill.stored={name}"], 0, 1, 0, 10) for name in ("exact", "views"))
    views = set()
    for one, other in zip(exact, half, strict=True):
        truth = torch.cat(teacher_on(one, world / "one", 1), dim=1)
        assert torch.equal(one.taught, truth)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.tokens, other.tokens)
        bound = truth.abs() * 2**-11 + 2**-25 + 1e-6  # 1e-6: rows were embedded together with others
        assert ((other.taught.float() - truth).abs() <= bound).all()
        views |= {(int(number), pixels.numpy().tobytes()) for number, pixels in zip(one.ids, one.pixels, strict=True)}
    assert len(views) > 1.3 * (ROWS - 1)  # another view in the second epoch, for two of three samples
    assert DAMAGED not in {number for number, _ in views}


def taught_loss(z: Embeddings, teachers: list[Embeddings]) -> tuple[float, list[Tensor]]:
    z = Embeddings(*(value.detach().clone().requires_grad_() for value in z[:4]))
    loss = TaughtLoss(SigmoidLoss(), 2.0, SigmoidSettings())(z._replace(teacher=teachers))
    loss.backward()
    return loss.item(), [value.grad for value in z[:3] if value.grad is not None]


def test_loss_and_gradients_are_those_of_running_the_teacher(world: Path) -> None:
    """Equal to the bit from a float32 column. From a float16 one, every stored vector is off by at most u = 2^-11 of
    its length 1 (and 1e-6: subnormal numbers, rows embedded together), so a teacher's logit by at most
    d = t (2 u + u^2), and every probability Q by a factor within e^(+-2 d). A row's KL then changes by at most
    (e^(2 d) - 1) max |log Q/P| + 2 d. The gradient by logits is weight / 2 b times P - Q of both directions, and texts
    have length 1: an image's gradient changes by at most weight x scale / 2 b (e^(2 d) - 1) (1 + its column's sum of
    Q), a text's alike."""
    recipe, weight = world / "recipe.yaml", 2.0
    [exact], [half] = (rows_of(recipe, [f"distill.stored={name}"], 0, 1, 0, 1) for name in ("exact", "views"))
    image, text = teacher_on(exact, world / "one", 1)
    scale = torch.tensor([tiny_saved(world / "one").head.logit_scale.exp().item()])
    z = dense_losses.batch(16, t=10.0, b=-3.0, dtype=torch.float32)
    truth, gradients = taught_loss(z, [Embeddings(image, text, scale, torch.zeros(1))])
    facts = columns(world, "exact")["teachers"]
    found, others = taught_loss(z, StoredTeacher("exact", facts)(exact, 16))
    assert found == truth
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    found, others = taught_loss(z, StoredTeacher("views", columns(world, "views")["teachers"])(half, 16))
    u = 2**-11 + 1e-6
    d = scale.item() * (2 * u + u * u)
    growth = float(np.expm1(2 * d))
    student, teacher = dense_losses.logits(z), scale * image @ text.T
    sums = max(teacher.softmax(k).sum(1 - k).max().item() for k in (0, 1))
    apart = max((teacher.log_softmax(k) - student.log_softmax(k)).abs().max().item() for k in (0, 1))
    assert 0 < abs(found - truth) <= weight * (growth * apart + 2 * d)
    for one, other in zip(gradients[:2], others[:2], strict=True):
        assert 0 < (one - other).norm(dim=1).max() <= weight * z.scale.item() * growth * (1 + sums) / 32


def columns(world: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "pairs/shards/manifest.json").read_text())["columns"][name]
    return found


def test_the_mean_over_teachers_is_that_of_each_alone(world: Path) -> None:
    """MobileCLIP's equation: 1/K sum of each teacher's divergence, each with its own temperature."""
    [batch] = rows_of(world / "recipe.yaml", ["distill.stored=both"], 0, 1, 0, 1)
    facts = columns(world, "both")["teachers"]
    taught = StoredTeacher("both", facts)(batch, 16)
    assert [list(one.image.shape) for one in taught] == [[16, 48], [16, 32]]
    for one, name in zip(taught, ("one", "two"), strict=True):
        image, text = teacher_on(batch, world / name, 16)
        torch.testing.assert_close(one.image, image, rtol=0, atol=2**-11)
        torch.testing.assert_close(one.text, text, rtol=0, atol=2**-11)
    taught[1] = taught[1]._replace(scale=taught[1].scale * 2)
    z = dense_losses.batch(16, t=10.0, dtype=torch.float64)
    mine = dense_losses.logits(z)
    whole = torch.zeros((), dtype=torch.float64)
    for one in taught:
        theirs = dense_losses.logits(Embeddings(*(value.double() for value in one[:4])))
        whole += sum((theirs.softmax(d) * (theirs.log_softmax(d) - mine.log_softmax(d))).sum() for d in (0, 1)) / 64
    main = SigmoidLoss()(z).item()
    assert taught_loss(z, taught)[0] == pytest.approx(main + 2.0 * whole.item(), rel=1e-6)


def same_rows(recipe: Path, overrides: list[str], whole: list[list[bytes]]) -> None:
    """This rank's rows are the slice of the whole batch, and stay so when the loader begins later."""
    rank, world = distributed.rank(), distributed.world_size()
    size = 16 // world
    for start in (0, 32):
        for number, batch in enumerate(rows_of(recipe, overrides, rank, world, start, 3)):
            for field, every in zip(batch, whole[start // 16 + number], strict=True):
                one = len(every) // 16
                assert field.numpy().tobytes() == every[rank * size * one : (rank + 1) * size * one]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 1), (4, 2)])
def test_views_and_captions_are_those_of_any_ranks_workers_and_start(world: Path, ranks: int, workers: int) -> None:
    recipe = world / "recipe.yaml"
    whole = [as_bytes(batch) for batch in rows_of(recipe, TAUGHT, 0, 1, 0, 5)]
    run_ranks(same_rows, ranks, recipe, [*TAUGHT, f"data.workers={workers}"], whole)


def test_whole_images_are_kept_decoded(world: Path) -> None:
    """Without augmentation there is one view, and the dataset is read once: the same rows as read one by one."""
    plain = ["data.augment={}", "distill.stored=whole"]
    assert embed.main([str(world / "recipe.yaml"), f"distill.teacher={world / 'one'}", *plain]) == 0
    read = rows_of(world / "recipe.yaml", [*plain, "data.cache_decoded=0"], 0, 1, 0, 6)
    kept = rows_of(world / "recipe.yaml", plain, 0, 1, 0, 6)
    assert [as_bytes(one) for one in kept] == [as_bytes(one) for one in read]
    with pytest.raises(UserError, match="all would be the same image"):
        embed.main(embedding(world, "one", "another", "data.augment={}"))


def test_a_filtered_view_has_the_same_views(world: Path, tmp_path: Path) -> None:
    assert filter_verb.main([str(world / "pairs/shards"), str(tmp_path / "view"), "--where", "width >= 1"]) in (0, None)
    rows = [
        rows_of(world / "recipe.yaml", [*TAUGHT, *more], 0, 1, 0, 2) for more in ([], [f"data.train={tmp_path}/view"])
    ]
    assert [as_bytes(one) for one in rows[0]] == [as_bytes(one) for one in rows[1]]


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the teacher was loaded")


def without_the_teacher(recipe: Path, *overrides: str) -> int:
    distill.build = never  # type: ignore[assignment]
    return call(recipe, *overrides)


@pytest.mark.parametrize("micro_batch", [4, 16])
def test_a_run_never_loads_its_teacher_and_goes_on_exactly(world: Path, tmp_path: Path, micro_batch: int) -> None:
    """One pass and two; stopped at two ranks and continued, the curve is the same to the bit."""
    recipe, taught = world / "recipe.yaml", [*TAUGHT, f"batch.micro_batch={micro_batch}"]
    out = [f"run.directory={tmp_path / name}" for name in ("whole", "run")]
    assert run_ranks(without_the_teacher, 2, recipe, *taught, out[0]) == [0, 0]
    assert run_ranks(stopped_at_step, 2, 4, recipe, *taught, out[1]) == [EXIT_AGAIN] * 2
    [text, _] = run_ranks(mistake, 2, recipe, "distill.stored=both", out[1])
    assert "is not the teacher that this run started with" in text and "\n" not in text
    assert run_ranks(call, 2, recipe, *taught, out[1]) == [0, 0]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    losses = [line["loss"] for line in steps(tmp_path / "whole")]
    assert losses[-1] < 0.9 * losses[0]


def running_on_stored_views(recipe: Path, *overrides: str) -> int:
    """A run whose loader draws the stored views and whose teacher is run on them, with the column's temperature."""
    path = overrides[0].partition("=")[2]

    def build_teacher(*_: Any) -> Any:
        return TeacherModel(load_teacher(path), path)

    runs.build_teacher = build_teacher  # type: ignore[assignment]
    return call(recipe, *overrides[1:])


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_curve_is_that_of_running_the_teacher(world: Path, tmp_path: Path, ranks: int) -> None:
    """Float32, micro-batches of one row: to the bit."""
    recipe, settings = world / "recipe.yaml", ["distill.stored=exact", "batch.micro_batch=1", "run.samples=64"]
    for name in ("stored", "run"):
        function: Callable[..., int] = call if name == "stored" else running_on_stored_views
        more = [] if name == "stored" else [f"path={world / 'one'}"]
        out = f"run.directory={tmp_path / name}"
        assert run_ranks(function, ranks, recipe, *more, *settings, out) == [0] * ranks
    assert curve(tmp_path / "stored") == curve(tmp_path / "run")
    assert len(curve(tmp_path / "run")) == 4


class Killed(Exception):
    pass


def test_a_killed_embedding_goes_on_and_the_manifest_comes_last(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(world / "pairs" / "shards", tmp_path / "shards")
    monkeypatch.setattr(embedding_column, "ROWS", 16)
    real, written = TeacherWriter.write, list[int]()

    def write(self: Any, part: int, *arrays: NDArray[Any]) -> None:
        if written == [0, 1]:
            raise Killed
        real(self, part, *arrays)
        written.append(part)

    monkeypatch.setattr(TeacherWriter, "write", write)
    command = embedding(world, "one", "again", "--data", str(copy))
    with pytest.raises(Killed):
        embed.main(command)
    manifest = copy / "manifest.json"
    assert "again" not in json.loads(manifest.read_text())["columns"]
    written.append(-1)
    assert embed.main(command) == 0
    assert written == [0, 1, -1, 2, 3, 4]
    entry = json.loads(manifest.read_text())["columns"]["again"]
    assert (entry["shape"], entry["dtype"], entry["empty"]) == ([ROWS, VIEWS, 48], "float16", 1)
    for name in ("", ".texts", ".captions"):
        one, other = (np.load(folder / "columns" / f"{column}{name}.npy") for folder, column in places(world, copy))
        assert np.array_equal(one, other)
    assert not list((copy / ".embed").glob("again-*"))
    before = (copy / entry["file"]).stat().st_mtime_ns
    assert embed.main(command) == 0
    assert (copy / entry["file"]).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is there with other views; give these another name"):
        embed.main([*command, "data.augment.flip=0"])


def places(world: Path, copy: Path) -> list[tuple[Path, str]]:
    return [(world / "pairs" / "shards", "views"), (copy, "again")]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distill.stored=nothing"], "is not there, or not finished (columns: "),
        (["distill.stored=other"], "is a column without a teacher"),
        (["distill.stored=../x"], "'../x' cannot name a column"),
        ([*TAUGHT, "distill.teacher={world}/other"], "is of the teacher {world}/one, distill.teacher names"),
        ([*TAUGHT, "data.augment.flip=0.25"], "views with data.augment.flip=0.5, the recipe says 0.25"),
        ([*TAUGHT, "data.augment={}"], "views with data.augment.crop_scale=[0.3, 0.9]"),
        ([*TAUGHT, "data.caption=[txt,third]"], "is of the captions ['txt', 'other'], data.caption asks for"),
        ([*TAUGHT, "data.noise.pairing=0.1"], "a stored teacher has not seen spoiled pairs"),
        (["distill.stored=clip", "distill.teacher=null"], "images are resized by crop, the student's by squash"),
        (["distill.teacher=[{world}/one,{world}/two]"], "several are not run beside the student"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_in_one_line(
    world: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    if (
        "distill.stored=clip" in overrides
        and "clip" not in json.loads((world / "pairs/shards/manifest.json").read_text())["columns"]
    ):
        assert embed.main(embedding(world, "clip", "clip")) == 0
    given = [one.replace("{world}", str(world)) for one in overrides]
    [text] = run_ranks(mistake, 1, world / "recipe.yaml", *given, f"run.directory={tmp_path / 'run'}")
    assert says.replace("{world}", str(world)) in text
    assert "\n" not in text


def spoiled(shards: Path, spoil: Callable[[Path, dict[str, Any]], None]) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    spoil(shards / "columns", manifest["columns"])
    (shards / "manifest.json").write_text(json.dumps(manifest))


def fewer_views(columns: Path, entries: dict[str, Any]) -> None:
    np.save(columns / "views.npy", np.load(columns / "views.npy")[:, :2])


def other_captions(columns: Path, entries: dict[str, Any]) -> None:
    np.save(columns / "views.captions.npy", np.load(columns / "views.captions.npy") + 1)


def no_texts(columns: Path, entries: dict[str, Any]) -> None:
    del entries["views.texts"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (fewer_views, "has views [80, 2, 48] and texts [80, 2, 48], but [80, 3, 48]"),
        (other_captions, "its captions have changed"),
        (no_texts, "the column 'views.texts' beside it is missing"),
    ],
)
def test_a_damaged_column_is_refused_in_one_line(world: Path, tmp_path: Path, spoil: Any, says: str) -> None:
    copy = shutil.copytree(world / "pairs" / "shards", tmp_path / "shards")
    spoiled(copy, spoil)
    more = [*TAUGHT, f"data.train={copy}", f"run.directory={tmp_path / 'run'}"]
    [text] = run_ranks(mistake, 1, world / "recipe.yaml", *more)
    assert says in text
    assert "\n" not in text
