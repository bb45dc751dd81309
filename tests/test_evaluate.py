"""`python -m trainer.evaluate` on exported models, runs and checkpoints: numbers, gallery, comparison, mistakes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import IMAGE_SIZE, WORDS, tiny_config, tiny_model, tiny_tokenizer
from tests.test_evals import benchmark, write_tar
from trainer import checkpoint
from trainer.core.types import UserError
from trainer.engine import EngineSettings, build_engine
from trainer.evaluate import find_recipe, label, load_model, main

PAIRS = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images, a caption of two words each, the first of which is its class; every caption is new, two images
    are the same."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (PAIRS, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=draw)
    pixels[7] = pixels[6]
    samples = []
    for number, picture in enumerate(pixels):
        data = io.BytesIO()
        Image.fromarray(picture.numpy()).save(data, "PNG")
        kind, word = WORDS[number % 3], WORDS[3 + number // 3]
        metadata = json.dumps({"kind": kind, "word": word, "kinds": f"{kind}|{WORDS[0]}"})
        samples.append({"png": data.getvalue(), "txt": f"{kind} {word}".encode(), "json": metadata.encode()})
    return write_tar(tmp_path_factory.mktemp("shards") / "a.tar", samples)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of tars that come without one are kept in the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("siglip").save_pretrained(folder)
    return folder


def test_scores_an_exported_model(
    exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "evaluation.json"
    arguments = [
        str(exported),
        "--data",
        str(shards),
        "--label",
        "kind",
        "--templates",
        "{kind} {word}",
        "--accept",
        "kinds",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["datasets"] == {str(shards): {"samples": PAIRS, "pictures": PAIRS, "captions": PAIRS, "damaged": 0}}
    assert found["ceilings"]["image_to_text_r1"] == pytest.approx((PAIRS - 1) / PAIRS)
    assert 0 <= found["metrics"]["image_to_text_r1"] <= found["metrics"]["image_to_text_r10"] <= 1
    assert found["metrics"]["kind_top5"] == 1.0
    assert found["metrics"]["kind_top1"] >= found["metrics"]["kind_strict_top1"]
    assert found["zeroshot"]["kind"]["classes"] == 3
    assert found["command"].startswith("python -m trainer.evaluate ") and torch.__version__.startswith(
        found["versions"]["torch"]
    )
    assert "image → caption  R@1" in printed and "kind  top-1" in printed and "a perfect model:  95.8%" in printed
    share = 100 * found["metrics"]["text_to_image_r5"]
    assert any(f"{share:.1f}%" in line for line in printed.splitlines() if "caption → image  R@5" in line)


def test_the_gallery_holds_queries_with_their_answers(exported: Path, shards: Path, tmp_path: Path) -> None:
    main([str(exported), "--data", str(shards), "--out", str(tmp_path / "evaluation.json")])
    gallery = json.loads((tmp_path / "gallery.json").read_text())
    assert gallery["scale"] == pytest.approx(10.0, rel=1e-5) and gallery["bias"] == -10.0
    (dataset,) = gallery["datasets"]
    numbers = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert dataset["image_to_text"] and dataset["text_to_image"]
    for direction, query in ((name, query) for name in ("image_to_text", "text_to_image") for query in dataset[name]):
        scores = [answer["score"] for answer in query["answers"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        places = [place for place, answer in enumerate(query["answers"], 1) if answer["right"]]
        assert (places == [query["place"]]) if query["place"] <= 5 else not places
        assert str(query["picture"]) in dataset["thumbnails"]
        assert ("captions" in query) == (direction == "image_to_text")
    assert all(uri.startswith("data:image/png;base64,") for uri in dataset["thumbnails"].values())
    assert any(query["place"] > 1 for query in dataset["image_to_text"]) == (numbers["image_to_text_r1"] < 1)


def test_compares_with_a_base(exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    tiny_model("clip", seed=3).save_pretrained(other)
    out = tmp_path / "evaluation.json"
    main([str(exported), "--data", str(shards), "--against", str(other), "--out", str(out)])
    found = json.loads(out.read_text())
    main([str(other), "--data", str(shards), "--out", str(out)])
    assert found["base_metrics"] == pytest.approx(json.loads(out.read_text())["metrics"])
    change = 100 * (found["metrics"]["image_to_text_r5"] - found["base_metrics"]["image_to_text_r5"])
    assert f"change {change:+5.1f}" in capsys.readouterr().out


def test_ranks_share_the_work(exported: Path, shards: Path, tmp_path: Path) -> None:
    arguments = [str(exported), "--data", str(shards), "--label", "kind", "--out"]
    assert main([*arguments, str(tmp_path / "alone.json")]) == 0
    assert run_ranks(main, 2, [*arguments, str(tmp_path / "both.json")]) == [0, 0]
    alone, both = (json.loads((tmp_path / name).read_text())["metrics"] for name in ("alone.json", "both.json"))
    assert both == pytest.approx(alone, abs=1e-12)


def test_reads_a_clip_benchmark_folder(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(exported), "--data", str(benchmark(tmp_path / "wds_faces"))])
    printed = capsys.readouterr().out
    assert "12 images" in printed and "zeroshot  top-1" in printed and "captions" not in printed


def recipe(run: Path, shards: Path) -> dict[str, Any]:
    return {
        "run": {"directory": str(run), "samples": 64},
        "model": {"config": tiny_config("siglip"), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(shards), "validation": str(shards)},
        "batch": {"size": 8},
        "eval": {"limit": 10, "zeroshot": [{"label": "kind", "templates": ["{} {word}"]}]},
    }


def _save(run: Path) -> str:
    model = tiny_model("siglip", seed=9)
    config = run.parent / "zero1.json"
    config.write_text('{"zero_optimization": {"stage": 1}}')
    engine = build_engine(
        model, torch.optim.AdamW(model.parameters()), EngineSettings(ds_config=str(config), precision="fp32")
    )
    return str(checkpoint.save(run, engine, 64, {}))


def test_a_run_and_its_checkpoint_are_scored_as_the_recipe_says(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(run, shards)))
    (folder,) = run_ranks(_save, 1, run)
    tiny_model("siglip", seed=9).save_pretrained(run / "export")
    results = []
    for where in (run, Path(folder), run / "export"):
        main([str(where), "--out", str(tmp_path / "evaluation.json")])
        found = json.loads((tmp_path / "evaluation.json").read_text())
        assert found["datasets"][str(shards)]["pictures"] == 10
        results.append(found["metrics"])
    assert results[0] == pytest.approx(results[1]) and results[0] == pytest.approx(results[2])
    assert "kind_top1" in results[0]
    assert load_model(str(run))[1] == folder
    main([str(run), "eval.limit=5", "--out", str(tmp_path / "evaluation.json")])
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"]["limit"] == 5
    other = find_recipe(None, str(run / "export"))
    assert other is not None and other.eval.limit == 10
    assert find_recipe(None, "some/model") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], r"eval\.data is empty"),
        (["{model}", "--data", "{folder}/absent"], "absent: no such"),
        (["{folder}", "--data", "{shards}"], "neither a run"),
        (["{model}", "--data", "{shards}", "--templates", "{{}}"], "need --label"),
        (["{model}", "--data", "{shards}", "batch.size=3"], "only eval.key=value"),
        (["{model}", "--data", "{shards}", "eval.limt=3"], "unknown key 'limt'; did you mean 'limit'"),
        (["{adapter}", "--data", "{shards}"], "an adapter, not a model: name its run"),
        (
            ["{folder}/absent", "--data", "{shards}"],
            "^'.*/absent' is neither a directory here nor a name on the Hugging Face hub",
        ),
        (["{cut}", "--data", "{shards}"], "^'.*/cut': its weights cannot be read there"),
        (["{model}", "--against", "{cut}", "--data", "{shards}"], "^'.*/cut': its weights cannot be read there"),
        (["{model}", "--data", "{shards}", "--out", "{folder}"], "is a directory: name a file in it"),
        (["{model}", "--recipe", "{folder}/absent.yaml"], "absent.yaml: no such recipe"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: list[str], message: str, exported: Path, shards: Path, tmp_path: Path
) -> None:
    adapter, cut = tmp_path / "adapter", Path(shutil.copytree(exported, tmp_path / "cut"))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:99])
    filled = [
        argument.format(model=exported, folder=tmp_path, shards=shards, adapter=adapter, cut=cut)
        for argument in arguments
    ]
    with pytest.raises(UserError, match=message) as caught:
        main(filled)
    assert "\n" not in str(caught.value)


def test_labels_read_well() -> None:
    assert label("image_to_text_r1") == "image → caption  R@1"
    assert label("de/text_to_image_r10") == "de/ caption → image  R@10"
    assert label("face_strict_top1") == "face strict  top-1"
    assert label("face_mean_per_class") == "face  mean over classes"
