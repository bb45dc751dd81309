"""A locked tower's embeddings stored beside the shards, and training on them: the same curve as running the tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, ViTConfig, ViTModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data_tools.__main__ import main as data_tools
from data_tools.commands import filter as filter_verb
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, make_shards, mistake, steps, stopped_at_step
from tests.support.shards import overwrite
from tests.support.tiny_models import tiny_captions, tiny_model, tiny_tokenizer
from trainer import embed, evaluate, export
from trainer.checkpoint import Checkpointer
from trainer.core.types import UserError
from trainer.data import embedding_column as storing
from trainer.runtime.signals import EXIT_AGAIN

ROWS = 80
DAMAGED = 7
LOCKED, STORED = "model.lock.image=true", "model.precomputed.image=tiny"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with one damaged image, two pretrained models of one shape, a pretrained ViT, and recipes for each."""
    folder = tmp_path_factory.mktemp("siglit")
    shards = make_shards(folder / "pairs", tiny_captions(ROWS))
    overwrite(shards, 0, DAMAGED)
    for seed, name in ((1, "base"), (2, "other")):
        tiny_model("siglip", seed=seed).save_pretrained(folder / name)
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    tree: dict[str, Any] = {
        "run": {"samples": 160},
        "model": {"path": str(folder / "base"), "lock": {"image": True}},
        "data": {"train": str(shards), "workers": 0},
        "batch": {"size": 16, "micro_batch": 4},
        "optim": {"lr": 2e-3, "eps": 1e-4},  # a small eps magnifies rounding where a gradient is mathematically zero
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000},
        "checkpoint": {"every": 64},
        "eval": {"every": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    bert = {"model_type": "bert", **sizes, "hidden_size": 32, "max_position_embeddings": 16}
    tree["model"] = {
        "image": {"path": str(folder / "vit")},
        "text": {"config": bert},
        "tokenizer": tiny_tokenizer(),
        "embed_dim": 24,
        "num_tokens": 8,
        "lock": {"image": True},
    }
    (folder / "pair.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def embedded(world: Path) -> Path:
    """The same with the columns of the base's image tower in fp16 and int8, of its text tower, and of the ViT."""
    recipe = world / "recipe.yaml"
    assert run_ranks(embed.main, 2, [str(recipe), STORED]) == [0, 0]
    for options in (
        [str(recipe), "model.precomputed.image=tiny8", "--storage", "int8"],
        [str(recipe), "model.lock={text: true}", "model.precomputed.text=words"],
        [str(world / "pair.yaml"), "model.precomputed.image=vit"],
    ):
        assert run_ranks(embed.main, 1, options) == [0]
    return world


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps(run)]


def worst(left: Path, right: Path) -> float:
    """Largest difference between two curves of ten steps, as a share of the loss."""
    one, other = np.array(losses(left)), np.array(losses(right))
    assert len(one) == len(other) == 10
    return float(np.abs(one / other - 1).max())


def replaced(run: Path) -> int:
    """Damaged samples that were met, on all ranks."""
    return json.loads((run / "checkpoints" / "samples-000000160" / "state.json").read_text())["extra"]["skipped"][
        "count"
    ]


def train(ranks: int, recipe: Path, out: Path, *overrides: str) -> Path:
    assert run_ranks(call, ranks, recipe, *overrides, f"run.directory={out}") == [0] * ranks
    return out


@pytest.mark.parametrize(("ds_config", "ranks"), [("zero0", 1), ("zero3", 2)])
def test_the_curve_is_that_of_the_tower_that_is_run(embedded: Path, tmp_path: Path, ds_config: str, ranks: int) -> None:
    """Relative to the loss, fp16 within 1e-4 and int8 within 2e-3. One image is damaged: both replace it by the same
    other."""
    recipe, config = embedded / "recipe.yaml", f"engine.ds_config={ds_config}"
    run = train(1, recipe, tmp_path / "run", LOCKED, "engine.ds_config=zero0", "batch.micro_batch=16")
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    stored = train(ranks, recipe, tmp_path / "stored", STORED, config)
    eighth = train(ranks, recipe, tmp_path / "int8", "model.precomputed.image=tiny8", config)
    print(f"largest difference of the loss: fp16 {worst(run, stored):.1e}, int8 {worst(run, eighth):.1e}")
    assert worst(run, stored) < 1e-4
    assert worst(run, eighth) < 2e-3
    assert replaced(stored) == replaced(run) == 2  # two epochs


@pytest.mark.parametrize(
    ("recipe", "run", "stored"),
    [
        ("recipe.yaml", ["model.lock={text: true}"], ["model.precomputed.text=words"]),
        ("pair.yaml", ["engine.ds_config=zero3"], ["model.precomputed.image=vit"]),
        ("recipe.yaml", ["engine.ds_config=zero1"], [STORED, "data.cache_decoded=0"]),
    ],
    ids=["text", "a pair whose projection trains", "read row by row"],
)
def test_so_is_that_of_other_towers(
    embedded: Path, tmp_path: Path, recipe: str, run: list[str], stored: list[str]
) -> None:
    left = train(1, embedded / recipe, tmp_path / "run", *run)
    right = train(1, embedded / recipe, tmp_path / "stored", *run, *stored)
    assert worst(left, right) < 1e-4


def test_no_picture_is_read_and_no_tower_is_there(embedded: Path, tmp_path: Path) -> None:
    """Every image is overwritten after embedding; the checkpoint has no image tower."""
    copy = tmp_path / "shards"
    shutil.copytree(embedded / "pairs" / "shards", copy)
    for shard, count in ((0, 30), (1, 30), (2, 20)):
        for row in range(count):
            overwrite(copy, shard, row, b"\0" * 20)
    whole = train(1, embedded / "recipe.yaml", tmp_path / "whole", STORED)
    run = train(1, embedded / "recipe.yaml", tmp_path / "run", STORED, f"data.train={copy}")
    assert losses(run) == losses(whole)
    from safetensors import safe_open

    with safe_open(run / "checkpoints" / "samples-000000160" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "vision" in name]  # noqa: SIM118 (no mapping)


def test_a_stopped_run_goes_on_elsewhere(embedded: Path, tmp_path: Path) -> None:
    recipe, out = embedded / "recipe.yaml", f"run.directory={tmp_path / 'run'}"
    whole = train(1, recipe, tmp_path / "whole", STORED)
    assert run_ranks(stopped_at_step, 2, 4, recipe, STORED, out, "engine.ds_config=zero3") == [EXIT_AGAIN] * 2
    run = train(1, recipe, tmp_path / "run", STORED, "engine.ds_config=zero1")
    assert worst(run, whole) < 1e-5


def scores(model: str, shards: Path, out: Path) -> dict[str, float]:
    assert evaluate.main([model, "--data", str(shards), "--limit", "0", "--out", str(out)]) == 0
    return json.loads(out.read_text())["metrics"]


def test_evaluation_and_export_have_the_real_tower(embedded: Path, tmp_path: Path) -> None:
    shards = embedded / "pairs" / "shards"
    run = train(
        2,
        embedded / "recipe.yaml",
        tmp_path / "run",
        STORED,
        f"data.validation={shards}",
        "eval.limit=0",
        "engine.ds_config=zero3",
    )
    assert export.main([str(run), str(tmp_path / "export")]) == 0
    logged = [json.loads(line)["eval"] for line in (run / "log.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    found = [scores(str(model), shards, tmp_path / "e.json") for model in (run, tmp_path / "export")]
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx({name: logged[name] for name in found[0]}, abs=0.02)
    base, exported = (
        AutoModel.from_pretrained(folder).state_dict() for folder in (embedded / "base", tmp_path / "export")
    )
    same = {name: torch.equal(base[name], exported[name]) for name in base}
    assert all(equal for name, equal in same.items() if name.startswith("vision"))
    assert not all(same.values())
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(embedded / "base"), str(embedded / "other")))
    with pytest.raises(UserError, match="was trained on stored embeddings of another tower"):
        evaluate.load_model(str(run))


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_the_manifest_comes_last(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(world / "pairs" / "shards", copy)
    (copy / "columns").exists() and shutil.rmtree(copy / "columns")
    monkeypatch.setattr(storing, "ROWS", 16)
    real, written = storing.ColumnWriter.write, []

    def write(self: Any, part: int, rows: Any) -> None:
        if written == [0, 1]:
            raise Killed
        real(self, part, rows)
        written.append(part)

    monkeypatch.setattr(storing.ColumnWriter, "write", write)
    command = [str(world / "recipe.yaml"), "model.precomputed.image=again", "--data", str(copy)]
    with pytest.raises(Killed):
        embed.main(command)
    assert "again" not in json.loads((copy / "manifest.json").read_text()).get("columns", {})
    written.append(-1)
    np.save(tmp_path / "numbers.npy", np.arange(ROWS))
    for options in (
        ["merge", str(copy)],
        ["join", str(copy), str(tmp_path / "numbers.npy")],
    ):  # others at work do not clear its parts
        assert data_tools(options) == 0
    assert embed.main(command) == 0
    assert written == [0, 1, -1, 2, 3, 4]
    entry = json.loads((copy / "manifest.json").read_text())["columns"]["again"]
    values = np.load(copy / entry["file"], allow_pickle=False)
    assert values.shape == (ROWS, 32)
    assert values.dtype == np.float16
    assert np.flatnonzero(~values.any(axis=1)).tolist() == [DAMAGED]
    assert entry["empty"] == 1
    assert not list((copy / ".embed").glob("again-*"))
    before = (copy / entry["file"]).stat().st_mtime_ns
    assert embed.main(command) == 0
    assert (copy / entry["file"]).stat().st_mtime_ns == before


def test_a_tower_may_compute_in_fp16(world: Path, tmp_path: Path) -> None:
    copy, stored = tmp_path / "shards", {}
    shutil.copytree(world / "pairs" / "shards", copy)
    for precision in ("fp32", "fp16"):
        options = [f"model.precomputed.image={precision}", "--data", str(copy), "--precision", precision]
        assert embed.main([str(world / "recipe.yaml"), *options]) == 0
        entry = json.loads((copy / "manifest.json").read_text())["columns"][precision]
        stored[precision] = np.load(copy / entry["file"], allow_pickle=False).astype(np.float32)
    error = np.linalg.norm(stored["fp16"] - stored["fp32"]) / np.linalg.norm(stored["fp32"])
    assert 1e-5 < error < 4e-3


def test_a_filtered_view_keeps_them(embedded: Path, tmp_path: Path) -> None:
    view = tmp_path / "view"
    assert filter_verb.main([str(embedded / "pairs" / "shards"), str(view), "--where", "width >= 1"]) in (0, None)
    whole = train(1, embedded / "recipe.yaml", tmp_path / "whole", STORED)
    assert losses(train(1, embedded / "recipe.yaml", tmp_path / "run", STORED, f"data.train={view}")) == losses(whole)


def saved_with_another_tower(recipe: Path, *overrides: str) -> int:
    real = Checkpointer.save

    def save(self: Checkpointer, engine: Any, samples_seen: int, extra: dict[str, Any], loss: Any = None) -> None:
        real(self, engine, samples_seen, extra | {"tower": "0" * 32}, loss)

    Checkpointer.save = save  # type: ignore[method-assign]
    return call(recipe, *overrides)


def test_a_run_does_not_go_on_with_another_tower(embedded: Path, tmp_path: Path) -> None:
    run = [STORED, f"run.directory={tmp_path / 'run'}"]
    assert run_ranks(saved_with_another_tower, 1, embedded / "recipe.yaml", *run, "run.samples=32") == [0]
    [text] = run_ranks(mistake, 1, embedded / "recipe.yaml", *run)
    assert (
        "was trained on stored embeddings of another tower (fingerprint 000000000000, that of model.precomputed is "
        in text
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch-size", "0"], "must be 1 or more"),
        (["--data", "{world}/recipe.yaml"], "is a file that is not a tar"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(embedded: Path, options: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        embed.main([str(embedded / "recipe.yaml"), STORED, *(text.format(world=embedded) for text in options)])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.precomputed.image=nothing"], "are not there, or not finished (columns: "),
        (["model.path={world}/other", STORED], "were made by another tower (fingerprint"),
        (["model.precomputed.image=vit"], "have shape [80, 48], the tower gives 32 numbers per sample"),
        (["model.precomputed.image=words"], "are of the text tower"),
        (
            ["model.lock={text: true}", "model.precomputed.text=words", "data.caption=other"],
            "data.caption asks for ['other']",
        ),
        (["model.lock.image=false", STORED], "only a tower that never changes can be stored: model.lock.image=true"),
        (["model.lock.image_layers=1", STORED], "only a tower that never changes can be stored: model.lock.image=true"),
        (["model.image_size=32", STORED], "were made by another tower"),
        ([STORED, "data.augment.flip=0.5"], "data.augment: stored image embeddings are of the whole images"),
        ([STORED, "model.mask.drop=0.5"], "cannot be dropped"),
        (["model.precomputed.image=../../x"], "'model.precomputed.image': '../../x' cannot name a column"),
        (["model.precomputed.image=''"], "'model.precomputed.image': '' cannot name a column"),
        (["model.precomputed={image: a, text: b}"], "only one tower can be precomputed"),
    ],
)
def test_a_mistake_is_one_clear_line(embedded: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    overrides = [text.format(world=embedded) if "{world}" in text else text for text in overrides]
    [text] = run_ranks(mistake, 1, embedded / "recipe.yaml", *overrides, f"run.directory={tmp_path / 'run'}")
    assert says in text
    assert "\n" not in text
