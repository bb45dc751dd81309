"""Export: what plain transformers and plain PEFT load is what was trained, whatever ZeRO stage wrote the checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel
from transformers import logging as hf_logging

from tests.support.tiny_models import KINDS, tiny_batch, tiny_model
from trainer import config, export
from trainer.checkpoint.state_io import Contents, write
from trainer.checkpoint.tensor_file import Entry
from trainer.core.types import Embeddings, UserError
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lora import LoraSettings

hf_logging.disable_progress_bar()
KEPT = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
"""What says the same in both kinds of export, or is not read by one of them."""


def recipe_of(model: ModelSettings, run: Path) -> config.Recipe:
    tree = {
        "run": {"directory": str(run), "samples": 64},
        "model": model.model_dump(mode="json"),
        "data": {"train": "x"},
        "batch": {"size": 8},
    }
    return config.Recipe.model_validate(tree)


def make_run(run: Path, model: DualEncoder) -> Path:
    """A run directory with one checkpoint of ``model``, as training leaves it; returns the checkpoint."""
    run.mkdir()
    (run / "recipe.yaml").write_text(config.dump(recipe_of(model.settings, run)), encoding="utf-8")
    state = dict(model.named_parameters())
    entries = {"model.safetensors": [Entry(name, value.dtype, tuple(value.shape)) for name, value in state.items()]}
    return write(
        run,
        Contents(64, entries, {"samples_seen": 64}),
        [("model.safetensors", name, value) for name, value in state.items()],
    )


@torch.no_grad()
def embeddings(plain: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, model = tiny_batch(5, seed=11), tiny_model("clip" if "clip" in type(plain).__name__.lower() else "siglip")
    if isinstance(plain, PeftModel):
        model = tiny_model("clip" if plain.base_model.model.config.model_type == "clip" else "siglip")
    pixels = batch.pixels * model.pixel_scale + model.pixel_shift
    image, text = plain.get_image_features(pixel_values=pixels), plain.get_text_features(input_ids=batch.tokens)
    return torch.nn.functional.normalize(image.pooler_output), torch.nn.functional.normalize(text.pooler_output)


def same(plain: Any, z: Embeddings) -> None:
    image, text = embeddings(plain.eval())
    torch.testing.assert_close(image, z.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, z.text, atol=1e-5, rtol=0)


EVALUATION = {
    "metrics": {"image_to_text_r1": 0.785},
    "standard_errors": {"image_to_text_r1": 0.013},
    "ceilings": {},
    "base_metrics": None,
    "datasets": {"demo/test": {"pictures": 1000, "captions": 900}},
    "command": "python -m trainer.evaluate runs/x",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_becomes_a_plain_directory_whose_card_works(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run, out = tiny_model(kind, seed=4).eval(), tmp_path / "run", tmp_path / "run" / "export"
    folder = make_run(run, model)
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "model": str(folder)}))
    assert export.main([str(run), str(out)]) == 0
    z = model(*tiny_batch(5, seed=11)[:3])
    same(AutoModel.from_pretrained(out), z)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "| image_to_text_r1 | 78.5 | 1.3 |" in text
    assert "64 pairs seen" in text
    Image.new("RGB", (20, 30), (200, 30, 30)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, {})
    assert "tensor([[" in capsys.readouterr().out
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "model": "elsewhere"}))
    assert export.main([str(folder), str(out)]) == 0
    assert "was measured on elsewhere" in capsys.readouterr().out
    assert "78.5" not in (out / "README.md").read_text(encoding="utf-8")
    assert not list(run.glob(".export*"))


def test_an_adapter_alone_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("siglip", seed=7).save_pretrained(tmp_path / "base")
    model = build(ModelSettings(path=str(tmp_path / "base"), lora=LoraSettings(rank=2))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    run = tmp_path / "run"
    make_run(run, model)
    assert export.main([str(run), str(run / "adapter")]) == 0
    assert export.main([str(run), str(run / "export"), "--merge"]) == 0
    z = model(*tiny_batch(5, seed=11)[:3])
    same(PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), str(run / "adapter")), z)
    same(AutoModel.from_pretrained(run / "export"), z)
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    Image.new("RGB", (20, 30)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, {})
    again = build(
        ModelSettings(path=str(tmp_path / "base"), lora=LoraSettings(rank=2, path=str(run / "adapter")))
    ).eval()
    torch.testing.assert_close(again(*tiny_batch(5, seed=11)[:3])[:4], z[:4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("first", [[], ["--merge"]], ids=["adapter", "merged"])
def test_of_an_export_of_the_other_kind_nothing_stays(tmp_path: Path, first: list[str]) -> None:
    """transformers lays an adapter that lies in a model's directory on that model: it would count twice."""
    tiny_model("siglip", seed=7).save_pretrained(tmp_path / "base")
    make_run(tmp_path / "run", build(ModelSettings(path=str(tmp_path / "base"), lora=LoraSettings(rank=2))))
    second = [] if first else ["--merge"]
    for out, options in (("same", first), ("same", second), ("alone", second)):
        assert export.main([str(tmp_path / "run"), str(tmp_path / out), *options]) == 0
    assert sorted(path.name for path in (tmp_path / "same").iterdir() if path.name not in KEPT) == sorted(
        path.name for path in (tmp_path / "alone").iterdir() if path.name not in KEPT
    )


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run", tiny_model())
    make_run(tmp_path / "lora", tiny_model(lora=LoraSettings(rank=2)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for arguments, message in (
        ([tmp_path / "none", tmp_path / "out"], "neither a run directory"),
        ([tmp_path / "run", tmp_path / "full"], "contains something other than a model"),
        ([tmp_path / "run", tmp_path / "full" / "thesis.tex"], "is a file"),
        ([tmp_path / "run", tmp_path / "out", "--merge"], "no model.lora"),
        ([tmp_path / "lora", tmp_path / "out"], "add --merge"),
    ):
        with pytest.raises(UserError, match=message) as error:
            export.main([str(argument) for argument in arguments])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_signal_leaves_a_whole_export_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    def weights() -> torch.Tensor:
        model = AutoModel.from_pretrained(tmp_path / "out")
        return torch.cat([value.flatten() for _, value in sorted(model.state_dict().items())])

    found = []
    for name, seed in (("old", 0), ("new", 1)):
        make_run(tmp_path / name, tiny_model("siglip", seed=seed))
    for name in ("new", "old"):
        assert export.main([str(tmp_path / name), str(tmp_path / "out")]) in (0, None)
        found.append(weights())
    new, old = found
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        pid = os.fork()
        if pid == 0:
            export.main([str(tmp_path / "new"), str(tmp_path / "out")])
            os._exit(0)
        time.sleep(delay)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        now = weights()
        assert torch.equal(now, old) or torch.equal(now, new), delay
    assert export.main([str(tmp_path / "new"), str(tmp_path / "out")]) in (0, None)
    assert torch.equal(weights(), new)
