"""Formats of other libraries, by the command line: what they compute of the written files is what was trained."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.open_clip_models import import_open_clip
from tests.support.tiny_models import KINDS, tiny_captions, tiny_model, tiny_settings
from tests.test_export import EVALUATION, make_run
from tests.test_models import as_pixels, photos
from tests.test_models_pooling import image_tower, text_tower
from trainer import export
from trainer.core.types import UserError
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lora import LoraSettings

NEEDS = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "pip install onnx onnxscript onnxruntime"),
    "sentence-transformers": (("sentence_transformers",), "pip install sentence-transformers"),
}


def needs(name: str) -> None:
    modules, install = NEEDS[name]
    if any(importlib.util.find_spec(module) is None for module in modules):
        pytest.skip(f"needs {', '.join(modules)}: {install}")


def exported(model: DualEncoder, folder: Path, name: str, *more: str) -> Path:
    run, out = folder / "run", folder / "out"
    checkpoint = make_run(run, model)
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "model": str(checkpoint)}))
    for _ in range(1 if name == "onnx" else 2):  # the second replaces the first; graphs take long
        assert export.main([str(run), str(out), "--format", name, *more]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| image_to_text_r1 | 78.5 | 1.3 |" in card
    assert not list(folder.glob(".out*"))
    return out


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the code of the card leaves, on an image of 20 x 30 pixels."""
    Image.new("RGB", (20, 30), (200, 30, 30)).save(out.parent / "picture.png")
    monkeypatch.chdir(out.parent)
    found: dict[str, Any] = {}
    [code] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(code, found)
    return found


def pair(folder: Path, **more: Any) -> DualEncoder:
    image, text = image_tower("vit without a pooler", folder / "image"), text_tower(folder / "text")
    return build(ModelSettings(image=image, text=text, embed_dim=24, num_tokens=9, **more)).eval()


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS), "pair"])
@torch.no_grad()
def test_onnxruntime_gives_the_same_embeddings(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnx")
    import onnxruntime

    model = pair(tmp_path) if kind == "pair" else tiny_model(kind).eval()
    out = exported(model, tmp_path, "onnx")
    assert not list(out.glob("*.safetensors"))
    facts = json.loads((out / "ringlip.json").read_text())
    for rows in (1, 3):
        pixels, (tokens, mask) = as_pixels(photos(rows)), model.preprocess.tokenize(tiny_captions(rows))
        z = model(pixels, tokens, mask)
        [image] = onnxruntime.InferenceSession(out / "image.onnx").run(None, {"pixels": pixels.numpy()})
        texts = {"tokens": tokens.numpy()} | ({"token_mask": mask.numpy()} if kind == "pair" else {})
        [text] = onnxruntime.InferenceSession(out / "text.onnx").run(None, texts)
        np.testing.assert_allclose(image, z.image.numpy(), atol=1e-5, rtol=0)
        np.testing.assert_allclose(text, z.text.numpy(), atol=1e-5, rtol=0)
    assert [facts["scale"], facts["bias"]] == pytest.approx([z.scale.item(), z.bias.item()])
    captions = ["a photo of a cat", "a photo of a dog"]
    logits = model(tokens=(told := model.preprocess.tokenize(captions))[0], token_mask=told[1])
    np.testing.assert_allclose(run_card(out, monkeypatch)["text"], logits.text.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sentence_transformers_gives_the_same_embeddings(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("sentence-transformers")
    from sentence_transformers import SentenceTransformer

    model = tiny_model(kind).eval()
    out = exported(model, tmp_path, "sentence-transformers")
    theirs, pictures = SentenceTransformer(str(out), device="cpu"), photos(3)
    captions = [*tiny_captions(3), "a red cat " * 20]
    z = model(as_pixels(pictures), *model.preprocess.tokenize(captions))
    for found, ours in ((theirs.encode(pictures), z.image), (theirs.encode(captions), z.text)):
        np.testing.assert_allclose(found, ours.numpy(), atol=1e-5, rtol=0)
    assert theirs.similarity_fn_name == "cosine"
    assert run_card(out, monkeypatch)["text"].shape == (2, 32)
    again = DualEncoder.from_pretrained(out).eval()
    torch.testing.assert_close(again(as_pixels(pictures)).image, z.image, atol=1e-6, rtol=0)


@torch.no_grad()
def test_open_clip_gives_the_same_embeddings_of_a_merged_adapter(tmp_path: Path) -> None:
    open_clip = import_open_clip()
    tiny_model("clip", seed=7).save_pretrained(tmp_path / "base")
    model = build(ModelSettings(path=str(tmp_path / "base"), lora=LoraSettings(rank=2))).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    out = exported(model, tmp_path, "open_clip", "--merge")
    theirs, tokenizer = open_clip.create_model(f"local-dir:{out}").eval(), open_clip.get_tokenizer(f"local-dir:{out}")
    pixels, captions = as_pixels(photos(3)), tiny_captions(3)
    z = model(pixels, *model.preprocess.tokenize(captions))
    image = theirs.encode_image(pixels * model.pixel_scale + model.pixel_shift, normalize=True)
    torch.testing.assert_close(image, z.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.encode_text(tokenizer(captions), normalize=True), z.text, atol=1e-5, rtol=0)


def test_formats_that_cannot_hold_the_model_are_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "lora", build(tiny_settings(lora=LoraSettings(rank=2))))
    make_run(tmp_path / "pair", pair(tmp_path))
    for run, name, message in (
        ("lora", "onnx", "needs the whole model: add --merge"),
        ("pair", "sentence-transformers", "this pair pools by image: cls, text: mean"),
        ("pair", "open_clip", "open_clip has no vision-text-dual-encoder model"),
    ):
        with pytest.raises(UserError, match=message) as error:
            export.main([str(tmp_path / run), str(tmp_path / "out"), "--format", name])
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out" / "config.json").exists()
