"""Two commands from what a user has to a trained model: a zip of class folders, sharded, trained on and evaluated
zero-shot by its classes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import yaml
from PIL import Image

from data_tools.__main__ import main as data_tools
from tests.support.forked_ranks import run_ranks
from tests.support.picture_files import encoded
from tests.support.runs import call, steps
from tests.support.tiny_models import tiny_config, tiny_tokenizer

COLOURS = {"red": (220, 30, 20), "green": (20, 200, 40), "blue": (30, 40, 220)}


def test_a_zip_of_class_folders_becomes_a_model_that_names_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "colours.zip", "w") as archive:
        for number in range(96):
            name, colour = list(COLOURS.items())[number % 3]
            shade = tuple(max(0, part - number) for part in colour)
            archive.writestr(f"colours/{name}/{number}.png", encoded(Image.new("RGB", (16, 16), shade)))
    shards = str(tmp_path / "shards")
    shard = ["shard", str(tmp_path / "colours.zip"), shards, "--caption-template", "a {class} house", "--quiet"]
    assert data_tools(shard) == 0

    recipe = tmp_path / "recipe.yaml"
    model = {"config": tiny_config(), "tokenizer": tiny_tokenizer()}
    training = {"optim": {"lr": 3e-3, "eps": 1e-6}, "engine": {"precision": "fp32"}, "log": {"every": 1}}
    recipe.write_text(yaml.safe_dump({"model": model, "batch": {"size": 24}, "data": {"workers": 0}, **training}))
    run = tmp_path / "run"
    overrides = [f"data.train={shards}", f"data.validation={shards}", f"run.directory={run}", "run.samples=960"]
    overrides.append('eval.zeroshot=[{label: cls, templates: ["a {} house"]}]')
    assert run_ranks(call, 1, recipe, *overrides) == [0]
    seen = steps(run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = next(value for line in lines for key, value in _flat(line).items() if key.endswith("cls_top1"))
    assert seen[-1]["loss"] < seen[0]["loss"] and found == 1.0


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
