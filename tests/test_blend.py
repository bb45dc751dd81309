"""Means of models: of weights, not of adapters; only of models that read the same inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tests.support.tiny_models import tiny_model
from tests.test_export import make_run
from trainer import export
from trainer.blend import blend, load_model
from trainer.core.types import UserError
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lora import LoraSettings


@pytest.fixture
def models(tmp_path: Path) -> list[DualEncoder]:
    """Three models; the first two are runs, the third is a Hugging Face directory."""
    found = [tiny_model("siglip", seed=seed).eval() for seed in (1, 2, 3)]
    make_run(tmp_path / "a", found[0])
    make_run(tmp_path / "b", found[1])
    found[2].save_pretrained(tmp_path / "base")
    return found


def test_a_soup_is_the_mean_of_all_weights(models: list[DualEncoder], tmp_path: Path) -> None:
    run, out = tmp_path / "a", tmp_path / "soup"
    assert export.main([str(run), str(out), "--average", str(tmp_path / "b"), str(tmp_path / "base")]) == 0
    states = [model.state_dict() for model in models]
    for name, value in load_model(str(out))[0].state_dict().items():
        wanted = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    text = (out / "README.md").read_text()
    assert f"the mean of {run}, {tmp_path / 'b'}, {tmp_path / 'base'}" in text
    assert AutoModel.from_pretrained(out).logit_scale.numel() == 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation_goes_from_the_base_to_the_run(models: list[DualEncoder], tmp_path: Path, share: float) -> None:
    out = tmp_path / "wise"
    assert export.main([str(tmp_path / "a"), str(out), "--interpolate", str(tmp_path / "base"), str(share)]) == 0
    ends = models[2].state_dict(), models[0].state_dict()
    for name, value in load_model(str(out))[0].state_dict().items():
        wanted = (1 - share) * ends[0][name].double() + share * ends[1][name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)


def test_an_adapter_is_merged_first(tmp_path: Path, models: list[DualEncoder]) -> None:
    adapted = build(ModelSettings(path=str(tmp_path / "base"), lora=LoraSettings(rank=2))).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    make_run(tmp_path / "lora", adapted)
    command = [str(tmp_path / "lora"), str(tmp_path / "wise"), "--interpolate", str(tmp_path / "base"), "0.5"]
    with pytest.raises(UserError, match="add --merge to --average and --interpolate"):
        export.main(command)
    assert export.main([*command, "--merge"]) == 0
    assert export.main([str(tmp_path / "lora"), str(tmp_path / "merged"), "--merge"]) == 0
    ends = models[2].state_dict(), load_model(str(tmp_path / "merged"))[0].state_dict()
    moved = 0.0
    for name, value in load_model(str(tmp_path / "wise"))[0].state_dict().items():
        torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2, rtol=1e-5, atol=1e-6)
        moved += (value - ends[0][name]).norm().item()
    assert moved > 0.1


def test_models_that_differ_are_refused(tmp_path: Path, models: list[DualEncoder]) -> None:
    with pytest.raises(UserError, match=r"other is another model than this: towers\.\S+ is \[.*\] there and \["):
        blend([models[0], tiny_model("siglip", width=48)], [0.5, 0.5], ["this", "other"])
    with pytest.raises(UserError, match=r"SHARE, that of the run's weights, is 0 to 1, not '2'"):
        export.main([str(tmp_path / "a"), str(tmp_path / "out"), "--interpolate", str(tmp_path / "base"), "2"])
    darker = tiny_model("siglip", seed=2)
    object.__setattr__(darker.preprocess, "mean", (0.1, 0.1, 0.1))
    with pytest.raises(UserError, match=r"other is another model than this: its mean differs"):
        blend([models[0], darker], [0.5, 0.5], ["this", "other"])
