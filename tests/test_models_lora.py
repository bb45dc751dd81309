"""LoRA: what is adapted, plain PEFT and plain transformers agree with it at every stage, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, PreTrainedModel
from transformers import logging as hf_logging

from tests.support.tiny_models import KINDS, tiny_batch, tiny_model
from trainer.core.types import UserError
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt import quantize
from trainer.models.adapt.lock import LockSettings
from trainer.models.adapt.lora import LoraSettings

hf_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for kind in KINDS:
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        tiny_model(kind, seed=7).save_pretrained(folders[kind])
    return folders


def adapted(base: str, **lora: Any) -> DualEncoder:
    return build(ModelSettings(path=base, lora=LoraSettings(rank=4, alpha=16, **lora)))


def train(model: DualEncoder, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.3)
    model.train()
    for step in range(steps):
        z = model(*tiny_batch(8, step)[:3])
        torch.nn.functional.softplus(
            -(2 * torch.eye(8) - 1) * (z.scale * z.image @ z.text.T + z.bias)
        ).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def plain_embeddings(plain: PreTrainedModel | PeftModel, model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tiny_batch(5, seed=11)
    pixels = batch.pixels * model.pixel_scale + model.pixel_shift
    image = plain.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[operator]
    text = plain.get_text_features(input_ids=batch.tokens).pooler_output  # type: ignore[operator]
    return torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)


CASES = [{}, {"dora": True}, {"rslora": True, "targets": ["q_proj", "mlp.fc1"]}, {"towers": "text", "dropout": 0.2}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", CASES, ids=["all-linear", "dora", "rslora", "text"])
def test_the_same_embeddings_at_every_stage(
    kind: str, lora: dict[str, Any], bases: dict[str, str], tmp_path: Path
) -> None:
    model = adapted(bases[kind], **lora)
    before = model.eval()(*tiny_batch(5, seed=11)[:3])
    train(model)
    with torch.no_grad():
        after = model(*tiny_batch(5, seed=11)[:3])
    assert (after.text - before.text).abs().max() > 1e-3
    assert ((after.image - before.image).abs().max() > 1e-3) == (lora.get("towers") != "text")
    model.save_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged")
    in_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(bases[kind]), str(tmp_path / "adapter")).eval()
    merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
    again = adapted(bases[kind], **lora, path=str(tmp_path / "adapter")).eval()
    z = again(*tiny_batch(5, seed=11)[:3])
    torch.testing.assert_close((z.scale, z.bias), (after.scale, after.bias))
    for image, text in (plain_embeddings(in_peft, model), plain_embeddings(merged, model), (z.image, z.text)):
        torch.testing.assert_close(image, after.image, atol=1e-5, rtol=0)
        torch.testing.assert_close(text, after.text, atol=1e-5, rtol=0)


def test_all_linear_leaves_out_what_would_never_learn(
    bases: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(bases["siglip"])
    assert "left out: vision_model.head.attention.out_proj" in capsys.readouterr().err
    train(model, 1)
    z = model.train()(*tiny_batch(8)[:3])
    ((z.scale * z.image @ z.text.T + z.bias) ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or name.startswith("head."))
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or "lora_A" in name, name
    linear = [
        name for name, module in tiny_model("siglip").towers.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == len(linear) - 1


def test_modules_to_save_train_whole(bases: dict[str, str], tmp_path: Path) -> None:
    model = adapted(bases["clip"], targets=["q_proj"], modules_to_save=("visual_projection",))
    train(model)
    model.save_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged")
    z = model(*tiny_batch(5, seed=11)[:3])
    in_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(bases["clip"]), str(tmp_path / "adapter")).eval()
    for plain in (in_peft, AutoModel.from_pretrained(tmp_path / "merged").eval()):
        torch.testing.assert_close(plain_embeddings(plain, model)[0], z.image, atol=1e-5, rtol=0)
    again = adapted(
        bases["clip"], targets=["q_proj"], modules_to_save=("visual_projection",), path=str(tmp_path / "adapter")
    ).eval()
    torch.testing.assert_close(again(*tiny_batch(5, seed=11)[:3]).image, z.image, atol=1e-6, rtol=0)


def test_an_adapter_of_another_base_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    adapted(bases["siglip"]).save_adapter(tmp_path / "adapter")
    tiny_model("siglip", seed=8).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="trained on another base") as error:
        adapted(str(tmp_path / "other"), path=str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not fit"):
        adapted(bases["siglip"], targets=["q_proj"], path=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        adapted(bases["siglip"], path=str(tmp_path))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["qproj"]}, "no linear module 'qproj' in the chosen towers; nearest: q_proj"),
        ({"targets": r"vision_model\..*\.q_proj", "towers": "text"}, "no linear module"),
        ({"targets": "("}, "not a regular expression"),
        ({"targets": ["attention.out_proj"]}, "cannot learn an adapter"),
        ({"modules_to_save": ("logit_scale",)}, "no module 'logit_scale'"),
    ],
)
def test_unknown_targets_name_the_nearest(lora: dict[str, Any], message: str, bases: dict[str, str]) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        adapted(bases["siglip"], **lora)
    assert "\n" not in str(error.value)


def test_a_locked_tower_cannot_be_adapted(bases: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot learn an adapter"):
        ModelSettings(path=bases["clip"], lora=LoraSettings(), lock=LockSettings(image=True))
    ModelSettings(path=bases["clip"], lora=LoraSettings(towers="text"), lock=LockSettings(image=True))
    with pytest.raises(UserError, match="no adapter to save"):
        tiny_model("clip").save_adapter("nowhere")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_nf4_computes_in_what_the_gpu_has_units_for(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert quantize._computes_in() == dtype
