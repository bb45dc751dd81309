"""Two towers that never met: their own weights are kept, new projections join them, plain transformers loads the
result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    EfficientNetConfig,
    EfficientNetModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from transformers import logging as hf_logging
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support.tiny_models import tiny_captions, tiny_model, tiny_tokenizer
from tests.test_models import as_pixels, photos
from trainer.core.settings import parse
from trainer.core.types import UserError
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lock import LockSettings
from trainer.models.adapt.lora import LoraSettings
from trainer.models.adapt.mask import MaskSettings
from trainer.models.vision_text import TowerSettings

hf_logging.disable_progress_bar()
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TowerSettings]:
    """A saved ViT, a saved BERT with its tokenizer, and a saved CLIP."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(1)
    ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    SiglipImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2] * 3, resample=2
    ).save_pretrained(folder / "vit")
    BertModel(BertConfig(**SIZES, vocab_size=30, max_position_embeddings=80)).save_pretrained(folder / "bert")
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer()).save_pretrained(folder / "bert")
    tiny_model("clip", seed=2).save_pretrained(folder / "clip")
    return {name: TowerSettings(path=str(folder / name)) for name in ("vit", "bert", "clip")}


def pair(towers: dict[str, TowerSettings], **more: Any) -> DualEncoder:
    torch.manual_seed(0)
    return build(ModelSettings(image=towers["vit"], text=towers["bert"], embed_dim=24, num_tokens=9, **more)).eval()


@torch.no_grad()
def same_in_plain_transformers(model: DualEncoder, folder: Path) -> None:
    plain, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pictures, captions = photos(6), tiny_captions(6)
    inputs = processor(images=pictures, text=captions, padding="max_length", return_tensors="pt")
    assert inputs["input_ids"].shape == (6, model.preprocess.num_tokens)
    z, theirs = model(as_pixels(pictures), *model.preprocess.tokenize(captions)), plain(**inputs)
    torch.testing.assert_close(z.image, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.text, theirs.text_embeds, atol=1e-5, rtol=0)
    again = DualEncoder.from_pretrained(folder).eval()
    torch.testing.assert_close(
        again(as_pixels(pictures), *again.preprocess.tokenize(captions))[:4], z[:4], atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_towers_keep_their_weights_and_the_pair_is_plain(towers: dict[str, TowerSettings], tmp_path: Path) -> None:
    model = pair(towers)
    assert [value.item() for value in model.head()] == pytest.approx([10, -10])
    assert model.preprocess.mean == (0.4, 0.4, 0.4)
    assert model.preprocess.resample == "bilinear"
    pixels, (tokens, mask) = as_pixels(photos(3)), model.preprocess.tokenize(tiny_captions(3))
    hidden = ViTModel.from_pretrained(str(towers["vit"].path)).eval()(
        pixel_values=pixels * model.pixel_scale + model.pixel_shift
    )
    image = hidden.pooler_output @ model.towers.get_submodule("visual_projection").weight.T  # type: ignore[operator]
    torch.testing.assert_close(model(pixels=pixels).image, torch.nn.functional.normalize(image), atol=1e-6, rtol=0)
    bert = BertModel.from_pretrained(str(towers["bert"].path)).eval()
    text = (
        bert(input_ids=tokens, attention_mask=mask).pooler_output
        @ model.towers.get_submodule("text_projection").weight.T
    )  # type: ignore[operator]
    torch.testing.assert_close(
        model(tokens=tokens, token_mask=mask).text, torch.nn.functional.normalize(text), atol=1e-6, rtol=0
    )
    model.save_pretrained(tmp_path)
    same_in_plain_transformers(model, tmp_path)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> TowerSettings:
    """A saved convolutional tower whose batch norms have seen images, with its own processor."""
    folder = tmp_path_factory.mktemp("efficientnet")
    torch.manual_seed(1)
    stages: dict[str, Any] = {
        "in_channels": [32, 8],
        "out_channels": [8, 16],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
    }
    stages |= {
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 2],
        "width_coefficient": 0.05,
        "depth_coefficient": 1.0,
    }
    config = EfficientNetConfig(**stages, image_size=16, hidden_dim=64, batch_norm_momentum=0.5, initializer_range=0.3)
    tower = EfficientNetModel(config).train()
    for _ in range(4):
        tower(torch.randn(16, 3, 16, 16))
    tower.save_pretrained(folder)
    EfficientNetImageProcessorPil(size={"height": 16, "width": 16}, resample=0).save_pretrained(folder)
    return TowerSettings(path=str(folder))


def test_a_convolutional_tower_embeds_every_picture_by_itself(
    towers: dict[str, TowerSettings], efficientnet: TowerSettings, tmp_path: Path
) -> None:
    model = build(ModelSettings(image=efficientnet, text=towers["bert"], embed_dim=24, num_tokens=9))
    pictures = photos(6)
    own = AutoImageProcessor.from_pretrained(str(efficientnet.path))(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(as_pixels(pictures) * model.pixel_scale + model.pixel_shift, own, atol=1e-5, rtol=1e-5)
    assert model.preprocess.resample == "nearest"
    before = {name: value.clone() for name, value in model.named_buffers()}
    for module in model.train().modules():  # what is random is left out here, to compare
        if "drop" in type(module).__name__.lower():
            module.eval()
    assert any("running_var" in name for name in before)
    whole = model(as_pixels(pictures)).image
    parts = torch.cat([model(pixels).image for pixels in as_pixels(pictures).split(2)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    whole.square()[:, 0].sum().backward()
    norms = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "batchnorm" in name and name.endswith("weight")
    }
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in norms.values())
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    model.eval().save_pretrained(tmp_path)
    same_in_plain_transformers(model, tmp_path)


def test_what_is_no_exact_or_no_plain_pair_is_refused(towers: dict[str, TowerSettings]) -> None:
    for config, message in (
        ({"image_size": 32}, "start from a pretrained one"),
        ({"model_type": "resnet"}, "take efficientnet or convnext"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build(
                ModelSettings(image=TowerSettings(config={"model_type": "efficientnet", **config}), text=towers["bert"])
            )
        assert "\n" not in str(error.value)


def test_a_new_convolutional_tower_with_layer_norms_is_as_any_other(
    towers: dict[str, TowerSettings], tmp_path: Path
) -> None:
    config = {
        "model_type": "convnext",
        "hidden_sizes": [8, 8, 8, 16],
        "depths": [1, 1, 1, 1],
        "image_size": 16,
        "patch_size": 2,
    }
    model = build(
        ModelSettings(image=TowerSettings(config=config), text=towers["bert"], embed_dim=24, num_tokens=9)
    ).eval()
    model.save_pretrained(tmp_path)
    same_in_plain_transformers(model, tmp_path)


def test_a_locked_pretrained_tower_meets_a_fresh_one(towers: dict[str, TowerSettings], tmp_path: Path) -> None:
    fresh = TowerSettings(config={"model_type": "clip_text_model", **SIZES, "max_position_embeddings": 9})
    settings = ModelSettings(
        image=towers["clip"], text=fresh, tokenizer=tiny_tokenizer(), embed_dim=24, lock=LockSettings(image=True)
    )
    model = build(settings).train()
    assert {
        name for name, parameter in model.towers.named_parameters() if parameter.requires_grad and "text" not in name
    } == {"visual_projection.weight"}
    assert not model.towers.get_submodule("vision_model").training
    assert model.trains("image")
    model.save_pretrained(tmp_path)
    same_in_plain_transformers(model.eval(), tmp_path)


def test_a_pair_learns_an_adapter(towers: dict[str, TowerSettings], tmp_path: Path) -> None:
    model = pair(
        towers,
        lora=LoraSettings(
            rank=2, modules_to_save=("visual_projection", "text_projection"), targets=["query", "q_proj"]
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path)
    same_in_plain_transformers(model, tmp_path)


def test_mistakes_are_one_line(towers: dict[str, TowerSettings]) -> None:
    tree = {"image": towers["vit"].model_dump(), "text": towers["bert"].model_dump()}
    for change, message in (
        ({"text": None}, "a pair needs both"),
        ({"path": "x"}, "give one of model.path"),
        ({"text": {"config": {"model_type": "bert"}}}, "a new text tower needs model.tokenizer"),
        ({"image": {}}, "a tower has either path"),
        ({"image": {"config": {"model_type": "vitt"}}}, "model.image.config"),
        ({"image": {"config": {"model_type": "vit", "hiden_size": 8}}}, "did you mean 'hidden_size'"),
        ({"image": {"path": "/none"}}, "model.image.path '/none' is neither a directory here"),
        ({"image_size": 32}, "is made for 16"),
        ({"mask": MaskSettings(drop=0.5).model_dump()}, "works for siglip and clip"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build(parse(ModelSettings, {**tree, **change}, "recipe.yaml"))
        assert "\n" not in str(error.value)
