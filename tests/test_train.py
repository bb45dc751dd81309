"""The real ``main`` on real ranks: from a recipe to a run directory, stopped, resumed, misused."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.forked_ranks import run_ranks
from tests.support.runs import PLAIN, call, curve, make_shards, mistake, steps, stopped_at_step
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer import losses, train
from trainer.core.types import UserError
from trainer.runtime.signals import EXIT_AGAIN

ROWS = 80


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pairs"), tiny_captions(ROWS))


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    """A recipe of ten steps of 16 pairs; validation on the training shards, since nothing is to be learnt here but the
    plumbing."""
    tree: dict[str, Any] = {
        "run": {"directory": str(tmp_path / "run"), "samples": 160},
        "model": {"config": tiny_config(dropout=0.1), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(shards), "validation": str(shards), "workers": 0},
        "batch": {"size": 16, "micro_batch": 4},
        "optim": {"lr": 3e-3, "eps": 1e-6},
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000},
        "checkpoint": {"every": 64},
        "eval": {"every": 0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_run_from_nothing_leaves_all_that_it_promises(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(call, 2, recipe) == [0, 0]
    assert capfd.readouterr().err.count("evaluated at 160 samples: image_to_text_r1 ") == 1
    run = tmp_path / "run"
    seen = steps(run)
    assert [line["samples_seen"] for line in seen] == list(range(16, 161, 16))
    assert all(0 < line["rank_seconds"]["least"] <= line["rank_seconds"]["most"] for line in seen)
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "samples-000000160"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["batch"]["micro_batch"] == 4
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1
    evaluated = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if '"eval"' in line]
    assert evaluated[-1]["samples_seen"] == 160
    assert "image_to_text_r1" in evaluated[-1]["eval"]
    assert list((run / "tensorboard").rglob("events*"))


@pytest.mark.parametrize("ds_config", ["zero1", "zero3"])
def test_a_run_that_was_stopped_has_the_same_numbers_as_one_that_was_not(
    recipe: Path, tmp_path: Path, ds_config: str
) -> None:
    config = f"engine.ds_config={ds_config}"
    run_ranks(call, 2, recipe, config, f"run.directory={tmp_path / 'whole'}")
    assert run_ranks(stopped_at_step, 2, 4, recipe, config) == [EXIT_AGAIN] * 2
    run = tmp_path / "run"
    assert (run / "checkpoints" / "latest").read_text().strip() == "samples-000000064"
    assert run_ranks(call, 2, recipe, config) == [0, 0]
    assert curve(run) == curve(tmp_path / "whole")


def poisoned(recipe: Path, *overrides: str) -> str:
    """From the third step on the loss is not a number on rank 1."""
    real = losses.build

    def build(settings: Any) -> Any:
        loss = real(settings)
        forward, count = loss.forward, iter(range(1, 1000))
        loss.forward = lambda z: forward(z) * (float("nan") if next(count) >= 3 and os.environ["RANK"] == "1" else 1.0)
        return loss

    losses.build = build
    return mistake(recipe, *overrides)


def test_a_loss_that_is_not_a_number_is_skipped_its_samples_written_down_and_ends_the_run(
    recipe: Path, tmp_path: Path
) -> None:
    for text in run_ranks(poisoned, 2, recipe, "optim.max_bad_steps=3"):
        assert "not finite in 3 steps in a row" in text
    notes = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "skipped_step" in line
    ]
    assert [note["samples_seen"] for note in notes] == [48, 64, 80]
    assert all(len(set(note["keys"])) == 16 and ".tar:" in note["keys"][0] for note in notes)
    assert [line["bad_steps"] for line in steps(tmp_path / "run")] == [0, 0, 1, 2, 3]


def test_other_ranks_stage_and_micro_batch_go_on_with_the_same_curve(recipe: Path, tmp_path: Path) -> None:
    run_ranks(
        call, 1, recipe, *PLAIN, "engine.ds_config=zero0", "batch.micro_batch=16", f"run.directory={tmp_path / 'whole'}"
    )
    run_ranks(stopped_at_step, 2, 4, recipe, *PLAIN, "engine.ds_config=zero3")
    run_ranks(call, 4, recipe, *PLAIN, "engine.ds_config=zero2", "batch.micro_batch=3")
    found, expected = curve(tmp_path / "run"), curve(tmp_path / "whole")
    assert [point[0] for point in found] == [point[0] for point in expected]
    np.testing.assert_allclose([point[1] for point in found], [point[1] for point in expected], rtol=2e-4)


def test_auto_takes_the_planners_micro_batch(recipe: Path, tmp_path: Path) -> None:
    given = [*PLAIN, "run.samples=32"]
    run_ranks(call, 2, recipe, *given, f"run.directory={tmp_path / 'given'}")
    run_ranks(call, 2, recipe, *given, "batch.micro_batch=auto")
    np.testing.assert_allclose(np.array(curve(tmp_path / "run")), np.array(curve(tmp_path / "given")), rtol=1e-4)


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(recipe: Path, tmp_path: Path) -> None:
    run_ranks(call, 1, recipe, "run.samples=32")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert run_ranks(call, 1, recipe, "run.samples=32") == [0]
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    [text] = run_ranks(mistake, 1, recipe, "run.samples=32", "data.validation=/nowhere/pictures")
    assert "/nowhere/pictures" in text, "nobody would look for it any more"
    assert run_ranks(call, 1, recipe, "run.samples=64") == [0]
    assert [line["samples_seen"] for line in steps(tmp_path / "run")] == [16, 32, 48, 64]


def test_going_on_under_another_recipe_is_said_and_keeps_the_one_before(
    recipe: Path, tmp_path: Path, capfd: Any
) -> None:
    run_ranks(call, 1, recipe, "run.samples=32")
    run_ranks(call, 1, recipe, "run.samples=32", "batch.micro_batch=8", "engine.ds_config=zero2")
    capfd.readouterr()
    run_ranks(call, 1, recipe, "run.samples=48", "batch.micro_batch=8", "loss.name=softmax")
    said = capfd.readouterr().err
    assert "the recipe has changed" in said and "run.samples 32 -> 48; loss.name sigmoid -> softmax" in said
    assert "micro_batch" not in said
    assert yaml.safe_load((tmp_path / "run" / "recipe-until-000000032.yaml").read_text())["loss"]["name"] == "sigmoid"
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["loss"]["name"] == "softmax"


def test_the_rate_of_the_head_is_its_own(recipe: Path, tmp_path: Path) -> None:
    def moved(factor: float, ds_config: str) -> float:
        folder = tmp_path / f"{ds_config}-{factor}"
        overrides = [
            f"model.rates.head={factor}",
            f"engine.ds_config={ds_config}",
            "run.samples=32",
            f"run.directory={folder}",
        ]
        run_ranks(call, 2, recipe, *overrides)
        return abs(steps(folder)[-1]["bias"] + 10)

    for ds_config in ("zero1", "zero3"):
        assert moved(10.0, ds_config) == pytest.approx(10 * moved(1.0, ds_config), rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.bta2=0.9"], "unknown key 'optim.bta2'; did you mean 'beta2'?"),
        (["batch.size=15"], "batch.size 15 does not divide by 2 ranks; the nearest that do are 14 or 16"),
        (["engine.ds_config=zero9"], "did you mean"),
        (["data.train=/nowhere/shards"], "/nowhere/shards"),
        (["model.tokenizer=/nowhere/tokenizer"], "/nowhere/tokenizer"),
        (["run.samples=3"], "run.samples is 3, less than one global batch"),
        (["--lr"], "'--lr' is not an option"),
        (["eval.zeroshot.label=colr"], "'eval.zeroshot' is a list: write eval.zeroshot='[{label: colr}]'"),
        (
            ["eval.zeroshot=[{label: a}]", "eval.zeroshot.label=colr"],
            "is a list; give all of it: eval.zeroshot='[{label: colr}]'",
        ),
        (
            ["data.train=/tmp/pairs.csv"],
            "'data.train': /tmp/pairs.csv is a table of pairs, but training reads shards: write them with",
        ),
        (["data.train=[{path: /tmp/pairs.csv}]"], "'data.train.0.path': /tmp/pairs.csv is a table of pairs"),
        (["data.validation={recipe}"], "'data.validation': {recipe} is a file that is not a tar"),
        (["eval.data=s3://bucket/pairs.parquet"], "eval.data: s3://bucket/pairs.parquet is a table of pairs"),
        (["data.train=[{path: a, wight: 3}]"], "unknown key 'data.train.0.wight'; did you mean 'weight'?"),
        (["data.workers=foo"], "'data.workers': Input should be a valid integer, unable"),
        (["batch.micro_batch=0"], "'batch.micro_batch': Input should be greater than 0 (got 0)"),
        (["data.workers=-1"], "'data.workers': -1 processes are not possible"),
        (["model.recompute.image=0"], "'model.recompute.image': 0 is not possible"),
        (["model.recompute.image=99"], "SiglipVisionModel has only 2 layers, so there is no 99-th"),
        (["run.directory={recipe}"], "run.directory {recipe} is not a writable directory"),
        (["run.directory={recipe}/run"], "run.directory {recipe}/run is not a writable directory"),
        (["data.validation=/nowhere/pictures"], "data.validation: /nowhere/pictures: no such folder"),
        (["eval.data=/nowhere/pictures"], "eval.data: /nowhere/pictures: no such folder"),
        (["eval.by=language"], "has no 'language', which eval.by asks for"),
        (["eval.zeroshot=[{label: colour}]"], "eval.zeroshot 'colour': "),
        (["eval.zeroshot=[{label: a, data: /nowhere/a}]"], "eval.zeroshot 'a': /nowhere/a: no such folder"),
        (["eval.zeroshot=[{label: sample, classes: /nowhere/a.txt}]"], "/nowhere/a.txt: no such file"),
        (["eval.zeroshot=[{label: sample, templates: [photoo]}]"], "'photoo' is neither a template"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_clear_line(
    recipe: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    for text in run_ranks(mistake, 2, recipe, *(override.replace("{recipe}", str(recipe)) for override in overrides)):
        assert says.replace("{recipe}", str(recipe)) in text
        assert "\n" not in text
    assert not (tmp_path / "run" / "log.jsonl").exists(), "it was found while training"


def test_the_command_line_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert "A list: eval.zeroshot='[{label: LABEL}]'" in text and "eval.zeroshot[].label = 'cls'" in text
    assert "name: auto (default)" in text
    with pytest.raises(SystemExit):
        train.main([])
    assert "required: RECIPE\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a directory: name a recipe in it"):
        train.main([str(tmp_path)])


def test_a_ds_config_that_sets_what_the_recipe_owns_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"train_batch_size": 32}')
    [text] = run_ranks(mistake, 1, recipe, f"engine.ds_config={tmp_path / 'own.json'}")
    assert "own.json: 'train_batch_size' belongs to the recipe: remove it here and set batch.size there" in text


def test_what_deepspeed_refuses_names_the_file(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}')
    [text] = run_ranks(mistake, 1, recipe, f"engine.ds_config={tmp_path / 'own.json'}")
    assert "own.json: DeepSpeed rejects 'reduce_bucket_size' 0: Input should be greater than 0" in text
    assert "\n" not in text


def test_a_checkpoint_of_another_model_is_refused(recipe: Path) -> None:
    run_ranks(call, 1, recipe, "run.samples=16")
    [text] = run_ranks(
        mistake, 1, recipe, "model.config.text_config.hidden_size=64", "model.config.text_config.intermediate_size=32"
    )
    assert "samples-000000016" in text
    assert "text_model" in text
    assert "\n" not in text


@pytest.fixture
def damaged(shards: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "shards"
        shutil.copytree(shards, copy)
        yield copy


def test_a_missing_shard_is_named(recipe: Path, damaged: Path) -> None:
    (damaged / "00001.tar").unlink()
    [text] = run_ranks(mistake, 1, recipe, f"data.train={damaged}")
    assert "00001.tar" in text
    assert "\n" not in text


def test_a_corrupt_member_is_replaced_counted_and_remembered(recipe: Path, damaged: Path, tmp_path: Path) -> None:
    rows = np.load(damaged / "00000.idx")
    with (damaged / "00000.tar").open("r+b") as tar:
        tar.seek(int(rows["image_offset"][3]) + 20)
        tar.write(b"\x00" * 30)
    assert run_ranks(call, 2, recipe, f"data.train={damaged}", f"data.validation={damaged}") == [0, 0]
    run = tmp_path / "run"
    assert len(steps(run)) == 10
    state = json.loads((run / "checkpoints" / "samples-000000160" / "state.json").read_text())
    skipped = state["extra"]["skipped"]
    assert skipped["count"] == 2  # two epochs
    assert len(skipped["keys"]) == 1
    assert "00000.tar" in skipped["keys"][0]


def test_an_empty_caption_is_counted_when_sharding(tmp_path: Path) -> None:
    out = make_shards(tmp_path / "pairs", ["a cat", "", "a dog"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == 2
    assert sum(manifest["rejected"].values()) == 1


def test_torch_stays_in_one_thread_here() -> None:
    assert torch.get_num_threads() == 1, "forked ranks hang once a parallel region has run in their parent"
