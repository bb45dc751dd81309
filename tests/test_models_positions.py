"""Captions longer than a checkpoint was trained with: Long-CLIP's stretching, under LoRA, exported, in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoProcessor, pipeline

from tests.support.tiny_models import WORDS, tiny_config, tiny_pretrained, tiny_tokenizer
from trainer.core.types import UserError
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lora import LoraSettings
from trainer.models.adapt.positions import TEXT_POSITIONS, kept, stretched
from trainer.models.card import whole_card

OLD, NEW = 44, 80


@pytest.fixture(scope="module", params=["clip", "siglip"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    config: dict[str, Any] = tiny_config(request.param)
    config["text_config"]["max_position_embeddings"] = OLD
    build(ModelSettings(config=config, tokenizer=tiny_tokenizer())).eval().save_pretrained(folder)
    return str(folder)


def long_clip(weight: torch.Tensor) -> torch.Tensor:
    """As the loop in Long-CLIP's own model/longclip.py (load_from_clip) does it: 77 to 248."""
    length, keep = weight.shape[0], 20
    new = torch.zeros(4 * length - 3 * keep, weight.shape[1], dtype=weight.dtype)
    new[:keep] = weight[:keep]
    for i in range(length - 1 - keep):
        for k in range(4):
            new[4 * i + keep + k] = (4 - k) / 4 * weight[i + keep] + k / 4 * weight[i + 1 + keep]
    for k in range(4):
        new[4 * length - 3 * keep - 4 + k] = weight[-1] + k / 4 * (weight[-1] - weight[-2])
    return new


def test_77_positions_become_long_clips_248() -> None:
    weight = torch.randn(77, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stretched(weight, 248, keep_last=False), long_clip(weight), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("positions", "size"), [(77, 248), (64, 65), (8, 30), (4, 5)])
def test_the_first_stay_and_where_siglip_pools_the_last_does(positions: int, size: int) -> None:
    weight = torch.randn(positions, 3, generator=torch.Generator().manual_seed(0))
    found = stretched(weight, size, keep_last=True)
    assert found.shape == (size, 3) and torch.equal(found[: kept(positions)], weight[: kept(positions)])
    torch.testing.assert_close(found[-1], weight[-1])


@torch.no_grad()
def test_short_captions_embed_as_before_where_long_clips_do(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain, longer = build(ModelSettings(path=base)).eval(), build(ModelSettings(path=base, num_tokens=NEW)).eval()
    short = [" ".join(WORDS[:n]) for n in (1, 7, 19)]  # and the end token: 20
    before, after = (m.embed_texts(*m.preprocess.tokenize(short)) for m in (plain, longer))
    said = capsys.readouterr().err
    if plain.family == "clip":
        torch.testing.assert_close(after, before, atol=2e-6, rtol=0)
        assert "captions of up to 20 tokens embed as before" in said
    else:
        assert "SigLIP attends to padding" in said
    ends = [" ".join(WORDS[:20] * 3 + [last]) for last in WORDS[:2]]
    one, other = longer.embed_texts(*longer.preprocess.tokenize(ends))
    assert (one - other).abs().max() > 1e-3, "what lies beyond the old end is read"


def test_they_train_beside_an_adapter_and_what_is_merged_is_what_transformers_reads(base: str, tmp_path: Path) -> None:
    model = build(ModelSettings(path=base, num_tokens=NEW, lora=LoraSettings(rank=2)))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert {name for name in trains if not name.startswith("head.")} == {f"towers.{TEXT_POSITIONS}.weight"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path)
    read, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    captions = [" ".join(WORDS * 4), "a red cat"]
    inputs = processor(text=captions, padding="max_length", truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == NEW
    with torch.no_grad():
        expected = model.embed_texts(*model.preprocess.tokenize(captions))
        found = read.get_text_features(input_ids=inputs["input_ids"]).pooler_output
        again = DualEncoder.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again.embed_texts(*again.preprocess.tokenize(captions)), expected)
    torch.testing.assert_close(torch.nn.functional.normalize(found), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="add --merge"):
        model.save_adapter(tmp_path / "adapter")


def test_what_cannot_be_stretched_is_told() -> None:
    with pytest.raises(UserError, match="has 8 position embeddings; raise its max_position_embeddings"):
        build(ModelSettings(config=tiny_config(), tokenizer=tiny_tokenizer(), num_tokens=9))


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_card_says_how_the_pipeline_reads_a_short_context(kind: str, tmp_path: Path) -> None:
    """The lines of the card are run: transformers' pipeline pads the captions of every SigLIP to 64 tokens."""
    from PIL import Image

    model = tiny_pretrained(kind, tmp_path)
    card = whole_card(model, str(tmp_path), [], "")
    assert ("_preprocess_params" in card) is (kind == "siglip")
    picture, labels = Image.new("RGB", (16, 16), "red"), ["red", "cat"]
    if kind == "clip":  # padded as far as its captions reach
        classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
        assert len(classify(picture, candidate_labels=labels, hypothesis_template="{}")) == 2
        return
    code = next(block for block in card.split("```python\n") if "pipeline(" in block).split("```")[0]
    picture.save(tmp_path / "picture.png")
    names: dict[str, Any] = {}
    exec(code.replace('"picture.png"', repr(str(tmp_path / "picture.png"))), names)
    assert {one["label"] for one in names["found"]} == {"a cat", "a dog"}
    texts = [f"This is a photo of {one['label']}." for one in names["found"]]
    with torch.no_grad():
        pixels = AutoProcessor.from_pretrained(tmp_path).image_processor(images=[picture], return_tensors="pt")
        plain = AutoModel.from_pretrained(tmp_path).eval()
        logits = plain(input_ids=model.preprocess.tokenize(texts)[0], **pixels).logits_per_image[0]
    expected = logits.sigmoid().tolist()
    assert [one["score"] for one in names["found"]] == pytest.approx(expected, rel=1e-4)
