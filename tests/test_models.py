"""The dual encoder against plain transformers: features, processors, saving, and what it refuses."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, Siglip2Tokenizer, SiglipTextConfig
from transformers import logging as hf_logging

from tests.support.shards import picture
from tests.support.tiny_models import (
    IMAGE_SIZE,
    KINDS,
    NUM_TOKENS,
    letter_tokenizer,
    tiny_batch,
    tiny_captions,
    tiny_config,
    tiny_model,
    tiny_pretrained,
    tiny_settings,
    tiny_tokenizer,
)
from trainer.core.settings import parse
from trainer.core.types import RunFailed, UserError
from trainer.data.transforms import fit
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.naflex import patch_inputs, unpack

hf_logging.disable_progress_bar()


def photos(rows: int, size: int = IMAGE_SIZE) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (rows, size, size, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def as_inputs(model: DualEncoder, pictures: list[Image.Image]) -> torch.Tensor:
    """Through the trainer's own preprocessing."""
    return torch.stack([fit(np.asarray(image), model.preprocess) for image in pictures])


def as_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    rows = [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(*picture.size[::-1], 3)
        for picture in pictures
    ]
    return torch.stack(rows).permute(0, 3, 1, 2)


def saved(kind: str, folder: Path) -> DualEncoder:
    model = tiny_pretrained("siglip2 naflex" if kind == "siglip2" else kind, folder, seed=3)
    with torch.no_grad():
        model.head.logit_scale.fill_(1.25)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", [*KINDS, "siglip2"])
@torch.no_grad()
def test_plain_transformers_gives_the_same_embeddings(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    plain, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    pictures, captions = photos(6), tiny_captions(6)
    sizes = (
        {"patch_size": 8, "max_num_patches": 4, "max_length": NUM_TOKENS} if kind == "siglip2" else {}
    )  # it does not remember them
    inputs = processor(
        images=pictures, text=captions, padding="max_length", truncation=True, return_tensors="pt", **sizes
    )
    ours = model(as_inputs(model, pictures), *model.preprocess.tokenize(captions))
    theirs = plain(**inputs)
    torch.testing.assert_close(ours.image, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text, theirs.text_embeds, atol=1e-5, rtol=0)
    of_text = ("input_ids", "attention_mask")
    images = plain.get_image_features(
        **{key: value for key, value in inputs.items() if key not in of_text}
    ).pooler_output
    texts = plain.get_text_features(**{key: value for key, value in inputs.items() if key in of_text}).pooler_output
    torch.testing.assert_close(ours.image, torch.nn.functional.normalize(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text, torch.nn.functional.normalize(texts), atol=1e-5, rtol=0)
    logits = ours.scale * ours.image @ ours.text.T + ours.bias
    torch.testing.assert_close(logits, theirs.logits_per_image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "siglip2"])
@torch.no_grad()
def test_saved_directory_is_plain_and_comes_back_equal(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
    }
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["logit_scale"].shape == (() if kind == "clip" else (1,))
    again, batch = DualEncoder.from_pretrained(tmp_path).eval(), tiny_batch(5)
    inputs = as_inputs(model, photos(5)), batch.tokens, batch.token_mask
    for left, right in zip(model(*inputs)[:4], again(*inputs)[:4], strict=True):
        torch.testing.assert_close(left, right, atol=0, rtol=0)
    ours, theirs = vars(model.preprocess).copy(), vars(again.preprocess).copy()
    assert ours.pop("tokenize")(["a red cat"])[0].tolist() == theirs.pop("tokenize")(["a red cat"])[0].tolist()
    assert ours == theirs


class Heard(logging.Handler):
    """What transformers warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.add(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    logger, handler = hf_logging.get_logger("transformers"), Heard()
    hf_logging.get_logger().warning_once.cache_clear()  # each warning is given once a process
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", [*KINDS, "siglip2"])
def test_loading_an_export_warns_of_nothing_in_it(kind: str, tmp_path: Path, heard: Heard) -> None:
    tokenizer = saved(kind, tmp_path).preprocess.tokenize.tokenizer  # type: ignore[attr-defined]
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    config = AutoModel.from_pretrained(tmp_path).config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == text.get(name) == getattr(tokenizer, name)
    heard.messages.clear()
    hf_logging.get_logger().warning_once.cache_clear()
    DualEncoder.from_pretrained(tmp_path)
    assert heard.messages == set(), "the trainer's own commands are quiet"
    AutoModel.from_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)
    assert heard.messages <= warns_of_its_own(heard)


def warns_of_its_own(heard: Heard) -> set[str]:
    """What transformers says of SigLIP's default config, whatever model is loaded (its issue 47612)."""
    before, heard.messages = heard.messages, set()
    hf_logging.get_logger().warning_once.cache_clear()
    SiglipTextConfig()
    found, heard.messages = heard.messages, before
    return found


def test_a_new_model_starts_where_siglip_did_and_every_parameter_has_a_dimension() -> None:
    siglip, clip = tiny_model("siglip"), tiny_model("clip")
    assert siglip.head.logit_scale.item() == pytest.approx(math.log(10))
    assert siglip.head().__len__() == 2
    assert siglip.head()[1].item() == -10
    assert clip.head()[0].item() == pytest.approx(1 / 0.07)
    assert clip.head.logit_bias is None
    assert clip.head()[1].tolist() == [0.0]
    for model in (siglip, clip):
        assert all(parameter.dim() > 0 and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_scale_and_bias_of_the_recipe_come_first(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    kept = build(ModelSettings(path=str(tmp_path)))
    assert kept.head.logit_scale.item() == pytest.approx(1.25)
    changed = build(ModelSettings(path=str(tmp_path), scale=20.0, bias=-3.0))
    assert [value.item() for value in changed.head()] == pytest.approx([20.0, -3.0])


@torch.no_grad()
def test_clip_with_a_bias_keeps_it(tmp_path: Path) -> None:
    model = tiny_model("clip", bias=-10.0)
    model.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)
    assert DualEncoder.from_pretrained(tmp_path).head()[1].item() == -10


@torch.no_grad()
def test_one_tower_at_a_time_and_padding() -> None:
    for kind in KINDS:
        model, batch = tiny_model(kind).eval(), tiny_batch(7)
        both = model(batch.pixels, batch.tokens, batch.token_mask)
        image, text = model(pixels=batch.pixels), model(tokens=batch.tokens, token_mask=batch.token_mask)
        assert image.text.shape == text.image.shape == (0, model.embed_dim)
        torch.testing.assert_close(image.image, both.image, atol=1e-6, rtol=0)
        torch.testing.assert_close(text.text, both.text, atol=1e-6, rtol=0)
        assert both.image.dtype == both.text.dtype == torch.float32
        torch.testing.assert_close(both.image.norm(dim=1), torch.ones(7))


@torch.no_grad()
def test_clip_needs_no_mask() -> None:
    model, batch = tiny_model("clip").eval(), tiny_batch(7)
    masked = model.towers.get_text_features(
        input_ids=batch.tokens, attention_mask=batch.token_mask.long()
    ).pooler_output  # type: ignore[operator]
    torch.testing.assert_close(
        model(tokens=batch.tokens).text, torch.nn.functional.normalize(masked), atol=1e-6, rtol=0
    )


def test_features_are_float32_under_autocast() -> None:
    model, batch = tiny_model(), tiny_batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(*batch[:3])
    assert {z.image.dtype, z.text.dtype, z.scale.dtype, z.bias.dtype} == {torch.float32}
    torch.testing.assert_close(z.text.norm(dim=1), torch.ones(3))


def test_tokenize_travels_to_workers() -> None:
    tokenize = pickle.loads(pickle.dumps(tiny_model("clip").preprocess)).tokenize
    tokens, mask = tokenize(["a red cat", "", "the large old house on " * 9])
    assert tokens.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert tokens.shape == mask.shape == (3, NUM_TOKENS)
    end = tokens[0].max().item()
    assert mask.sum(dim=1).tolist() == [4, 1, NUM_TOKENS]
    assert tokens[torch.arange(3), mask.sum(dim=1) - 1].tolist() == [end] * 3
    assert tokenize([])[0].shape == (0, NUM_TOKENS)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_another_resolution(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "base")
    model = build(ModelSettings(path=str(tmp_path / "base"), image_size=24)).eval()
    model.save_pretrained(tmp_path / "large")
    pictures = photos(4, 24)
    assert model.preprocess.image_size == (24, 24)
    inputs = AutoProcessor.from_pretrained(tmp_path / "large")(images=pictures, return_tensors="pt")
    plain = (
        AutoModel.from_pretrained(tmp_path / "large")
        .get_image_features(pixel_values=inputs["pixel_values"])
        .pooler_output
    )
    ours = model(pixels=as_pixels(pictures)).image
    torch.testing.assert_close(ours, torch.nn.functional.normalize(plain), atol=1e-5, rtol=0)
    base = AutoModel.from_pretrained(tmp_path / "base")
    interpolated = base.get_image_features(
        pixel_values=inputs["pixel_values"], interpolate_pos_encoding=True
    ).pooler_output
    torch.testing.assert_close(ours, torch.nn.functional.normalize(interpolated), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="multiple of the patch size 8"):
        build(ModelSettings(path=str(tmp_path / "base"), image_size=20))


@torch.no_grad()
def test_naflex_reads_pictures_at_their_own_aspect(tmp_path: Path) -> None:
    saved("siglip2", tmp_path / "base")
    model = build(ModelSettings(path=str(tmp_path / "base"), num_patches=6)).eval()
    model.save_pretrained(tmp_path / "large")
    assert (
        DualEncoder.from_pretrained(tmp_path / "large").preprocess.image_size == model.preprocess.image_size == (8, 56)
    )
    pictures = [picture(number, size) for number, size in enumerate([(24, 16), (16, 24), (48, 8), (8, 40), (16, 16)])]
    inputs = AutoProcessor.from_pretrained(tmp_path / "large")(
        images=pictures, return_tensors="pt", patch_size=8, max_num_patches=6
    )
    strips = as_inputs(model, pictures)
    patches, grids = unpack(strips)
    ours = patch_inputs(patches * model.pixel_scale[:, None] + model.pixel_shift[:, None], grids)
    assert grids.tolist() == inputs["spatial_shapes"].tolist() == [[2, 3], [3, 2], [1, 6], [5, 1], [2, 2]]
    assert ours["pixel_attention_mask"].tolist() == inputs["pixel_attention_mask"].tolist()
    torch.testing.assert_close(ours["pixel_values"], inputs["pixel_values"], atol=1e-6, rtol=0)
    plain = AutoModel.from_pretrained(tmp_path / "large").get_image_features(**inputs).pooler_output
    torch.testing.assert_close(model(pixels=strips).image, torch.nn.functional.normalize(plain), atol=1e-5, rtol=0)
    alone = torch.cat([model(pixels=strip[None]).image for strip in strips])
    torch.testing.assert_close(alone, model(pixels=strips).image, atol=1e-6, rtol=0)
    assert model(pixels=torch.zeros_like(strips)).image.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bottleneck_before_the_text_tower_is_multiplied_out_on_export(kind: str, tmp_path: Path) -> None:
    whole, model = tiny_model(kind), tiny_model(kind, token_bottleneck=4)
    vocabulary, width = 23, 32
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (whole, model)]
    assert sizes[0] - sizes[1] == vocabulary * width - 4 * (vocabulary + width)
    batch = tiny_batch(5)
    model(tokens=batch.tokens).text.sum().backward()
    embedding = model.towers.get_submodule("text_model.embeddings.token_embedding")
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in embedding.parameters())
    model.eval().save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval().get_text_features(input_ids=batch.tokens).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(plain), model(tokens=batch.tokens).text, atol=1e-5, rtol=0)
    with torch.device("meta"):
        assert build(tiny_settings(kind, token_bottleneck=4), weights=False).token_drop is None
    refused("is for a new text tower", path=str(tmp_path), token_bottleneck=4)
    refused("the text tower is 32 wide", config=tiny_config(kind), tokenizer=tiny_tokenizer(), token_bottleneck=32)


def test_plan_without_memory(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    with torch.device("meta"):
        model = build(ModelSettings(path=str(tmp_path)), weights=False)
        assert all(parameter.is_meta for parameter in model.parameters())


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(parse(ModelSettings, settings, "recipe.yaml"))
    assert "\n" not in str(error.value)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    clip = tiny_config("clip")
    refused("give one of model.path")
    refused("give one of model.path", path="x", config=clip)
    refused("a new text tower needs model.tokenizer", config=clip)
    refused("model.path .* is neither a directory here nor", path=str(tmp_path / "none"), tokenizer=tiny_tokenizer())
    refused("model.path .* is neither a directory here nor", path=str(tmp_path / "none"))
    refused("model.tokenizer .* is neither a directory here nor", config=clip, tokenizer=str(tmp_path / "none"))
    refused("model.tokenizer .*: its tokenizer cannot be read there", config=clip, tokenizer=str(tmp_path))
    refused("did you mean 'hidden_size'", config={"vision_config": {"hiden_size": 3}}, tokenizer=tiny_tokenizer())
    refused("model_type is 'bert', known: siglip, clip", config={"model_type": "bert"}, tokenizer=tiny_tokenizer())
    refused("is no Siglip2Tokenizer", config=tiny_config("siglip2"), tokenizer=tiny_tokenizer())
    refused("set model.image_size instead", config=clip, tokenizer=tiny_tokenizer(), num_patches=9)
    refused(
        "set model.num_patches instead",
        config=tiny_config("siglip2"),
        tokenizer=letter_tokenizer(Siglip2Tokenizer),
        image_size=16,
    )
    refused(
        "multiple of the number of attention heads",
        config={**clip, "vision_config": {"hidden_size": 33}},
        tokenizer=tiny_tokenizer(),
    )
    for tower, key, value, words in (
        (
            "vision_config",
            "num_attention_heads",
            3,
            "model.config: invalid model config .*must be divisible by num_heads",
        ),
        ("vision_config", "patch_size", 0, "model.config.vision_config.patch_size. is 0: a whole number"),
        ("vision_config", "image_size", 4, "image_size. 4 is less than one patch .8."),
        ("text_config", "num_hidden_layers", -1, "num_hidden_layers. is -1: a whole number"),
        ("text_config", "hidden_act", "foo", "model.config: invalid model config .*foo"),
    ):
        siglip = tiny_config("siglip")
        refused(words, config={**siglip, tower: {**siglip[tower], key: value}}, tokenizer=tiny_tokenizer())
    small = {**clip, "text_config": {**clip["text_config"], "vocab_size": 9}}
    refused("has ids up to 22, the text tower has 9 embeddings", config=small, tokenizer=tiny_tokenizer())
    other = {**clip, "text_config": {**clip["text_config"], "eos_token_id": 5}}
    refused("end token of .* is 22", config=other, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\x10\0\0\0", "its weights cannot be read there"),
        ("model.safetensors", None, "its weights cannot be read there .*model.safetensors"),
        ("config.json", b"{", "its config cannot be read there"),
        ("tokenizer.json", b"{", "its tokenizer cannot be read there"),
    ],
)
def test_a_damaged_directory_is_one_line(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    saved("siglip", tmp_path / "model")
    if content is None:
        (tmp_path / "model" / file).unlink()
    else:
        (tmp_path / "model" / file).write_bytes(content)
    refused(f"model.path '{tmp_path}/model': {message}", path=str(tmp_path / "model"))


def test_a_hub_name_without_a_network_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RunFailed, match=r"model\.path 'ringlip/none' is not a local directory, and its config could not be fetched"
    ):
        build(ModelSettings(path="ringlip/none"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    saved("clip", tmp_path / "model")
    shutil.copytree(tiny_tokenizer(), tmp_path / "words")
    words = tmp_path / "words" / "tokenizer.json"
    words.write_text(words.read_text().replace('"cat": 10', '"cow": 10'))
    assert "cow" in AutoTokenizer.from_pretrained(tmp_path / "words").get_vocab()
    refused(
        "differs from the one that .* was trained with", path=str(tmp_path / "model"), tokenizer=str(tmp_path / "words")
    )
    build(ModelSettings(path=str(tmp_path / "model"), tokenizer=tiny_tokenizer()))


def test_the_end_token_that_transformers_misreads_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer(), tmp_path / "words"))
    words = folder / "tokenizer.json"
    text = words.read_text()
    for old, new in (('"a": 2', '"a": 22'), ('"[END]": 22', '"[END]": 2'), ('"id": 22', '"id": 2')):
        assert old in text
        text = text.replace(old, new)
    words.write_text(text.replace("        22\n", "        2\n"))
    refused("ends captions with id 2", config=tiny_config("clip"), tokenizer=str(folder))
    assert build(ModelSettings(config=tiny_config("siglip"), tokenizer=str(folder))).embed_dim == 32
    assert tiny_settings("siglip").tokenizer == tiny_tokenizer()


def test_a_siglip_whose_tokenizer_masks_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("siglip", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    tree = json.loads(path.read_text())
    assert tree["model_input_names"] == ["input_ids"]
    DualEncoder.from_pretrained(tmp_path / "base")
    assert "attention mask" not in "".join(capsys.readouterr())
    path.write_text(json.dumps({**tree, "model_input_names": ["input_ids", "attention_mask"]}))
    model = DualEncoder.from_pretrained(tmp_path / "base").eval()
    assert "its tokenizer returns an attention mask" in "".join(capsys.readouterr())
    model.save_pretrained(tmp_path / "out")
    texts = {}
    for name in ("base", "out"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        inputs = tokenizer(["a cat"], padding="max_length", max_length=NUM_TOKENS, return_tensors="pt")
        with torch.no_grad():
            texts[name] = AutoModel.from_pretrained(tmp_path / name).get_text_features(**inputs).pooler_output
    ours = model(tokens=model.preprocess.tokenize(["a cat"])[0]).text
    torch.testing.assert_close(torch.nn.functional.normalize(texts["out"]), ours, atol=1e-5, rtol=0)
    assert (texts["base"] - texts["out"]).abs().max() > 1e-4, "that is what the warning is about"
