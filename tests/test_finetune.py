"""Finetuning a pretrained model by the real commands: train on two ranks, export, load in plain PEFT and plain
transformers, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor
from transformers import logging as hf_logging

from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, curve, make_shards, mistake, stopped_at_step
from tests.support.shards import picture
from tests.support.tiny_models import IMAGE_SIZE, NUM_TOKENS, PRETRAINED, tiny_captions, tiny_pretrained
from trainer import config, evaluate, export, train
from trainer.core import distributed
from trainer.core.types import UserError
from trainer.data.transforms import fit
from trainer.engine.ds_config import FOLDER
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt import quantize
from trainer.models.adapt.lora import LoraSettings

hf_logging.disable_progress_bar()
SQUARES = [picture(number, (IMAGE_SIZE, IMAGE_SIZE)) for number in range(5)]
NATIVE = [picture(number, size) for number, size in enumerate([(16, 16), (32, 8), (8, 32), (24, 8), (16, 16)])]
"""Images of whole patches, which no processor has to resize."""
CAPTIONS = tiny_captions(5, seed=11)


def pictures(config: Any) -> list[Image.Image]:
    """What a model is compared on: NaFlex reads any aspect."""
    return NATIVE if config.model_type == "siglip2" else SQUARES


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pairs"), tiny_captions(48))


def write_recipe(folder: Path, base: Path, shards: Path, stage: str, **model: Any) -> Path:
    """A recipe of three steps of 16 pairs in micro-batches of 4."""
    zero = json.loads((FOLDER / f"{stage}.json").read_text())
    if stage == "zero3":  # as it comes it would keep parameters this small whole on every rank
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "ds_config.json").write_text(json.dumps(zero))
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "run"), "samples": 48},
        "model": {"path": str(base), **model},
        "data": {"train": str(shards), "workers": 0},
        "batch": {"size": 16, "micro_batch": 4},
        "optim": {"lr": 1e-2, "eps": 1e-4},
        "engine": {"precision": "fp32", "ds_config": str(folder / "ds_config.json")},
        "log": {"line_seconds": 1000},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def trained(recipe: Path, *overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank does: the training command, then the embeddings of some images and CAPTIONS as the engine gives
    them."""
    runs, build = [], train.build
    train.build = lambda recipe: runs.append(build(recipe)) or runs[-1]
    distributed.shutdown = lambda: None  # the group is still needed
    assert call(recipe, *overrides) == 0
    [run] = runs
    run.model.eval()
    return ours(run.model, run.engine.forward)


@torch.no_grad()
def ours(model: DualEncoder, forward: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Through the trainer's own preprocessing."""
    pixels = torch.stack([fit(np.asarray(image), model.preprocess) for image in pictures(model.towers.config)])
    z = forward(*(part.to(distributed.device()) for part in (pixels, *model.preprocess.tokenize(CAPTIONS))))
    return z.image, z.text


@torch.no_grad()
def plain(model: Any, processor_of: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Through transformers alone."""
    model.eval()
    config = (model.base_model.model if isinstance(model, PeftModel) else model).config
    sizes = (
        {"patch_size": 8, "max_num_patches": 4} if config.model_type == "siglip2" else {}
    )  # it does not remember them
    processor = AutoProcessor.from_pretrained(processor_of)
    images = processor.image_processor(images=pictures(config), return_tensors="pt", **sizes)
    texts = processor.tokenizer(
        CAPTIONS, padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt"
    )
    image = model.get_image_features(**images).pooler_output
    text = model.get_text_features(**{key: texts[key] for key in processor.tokenizer.model_input_names}).pooler_output
    return normalize(image), normalize(text)


def same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
@pytest.mark.parametrize("kind", PRETRAINED)
def test_lora_gives_the_same_embeddings_at_every_stage(kind: str, stage: str, shards: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    before = ours(model := tiny_pretrained(kind, base), model)
    recipe = write_recipe(tmp_path, base, shards, stage, lora={"rank": 4})
    after = run_ranks(trained, 2, recipe, "run.samples=32")[0]
    for old, new in zip(before, after, strict=True):
        assert (new - old).abs().max() > 1e-3
    assert export.main([str(run), str(run / "adapter")]) == 0
    assert export.main([str(run), str(run / "export"), "--merge"]) == 0
    same(plain(PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(run / "adapter")), base), after)
    same(plain(AutoModel.from_pretrained(run / "export"), run / "export"), after)
    merged = DualEncoder.from_pretrained(run / "export").eval()
    same(ours(merged, merged), after)
    same(plain(AutoModel.from_pretrained(base), base), before)  # PEFT and merging left the base as it was


BF16 = "engine.precision=bf16"


@pytest.mark.parametrize(
    ("stage", "precision", "base"),
    [("zero0", "bf16", "bfloat16"), ("zero3", "bf16", "bfloat16"), ("zero1", "fp16", "float16")],
)
def test_a_base_held_in_16_bits_changes_no_bit_of_training_in_them(
    stage: str, precision: str, base: str, shards: Path, tmp_path: Path
) -> None:
    tiny_pretrained("siglip", tmp_path / "base")
    recipe = write_recipe(tmp_path, tmp_path / "base", shards, stage, lora={"rank": 4})
    short = [f"engine.precision={precision}", "run.samples=32"]
    run_ranks(call, 2, recipe, *short, f"run.directory={tmp_path / 'whole'}")
    run_ranks(call, 2, recipe, *short, f"model.lora.base={base}")
    found, expected = (
        load_file(tmp_path / run / "checkpoints" / "samples-000000032" / "model.safetensors")
        for run in ("run", "whole")
    )
    assert any(value.abs().max() > 0 for name, value in found.items() if ".lora_B." in name)
    held, dtype = build(config.load(recipe, [f"model.lora.base={base}"]).model), getattr(torch, base)
    rounded = {name for name, parameter in held.named_parameters() if parameter.dtype == dtype}
    assert sum(expected[name].numel() for name in rounded) > 0.7 * sum(value.numel() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.to(dtype).float() if name in rounded else value, atol=0, rtol=0)


def test_an_adapter_trained_on_a_rounded_base_is_exported_for_the_base_itself(shards: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    tiny_pretrained("clip", base)
    recipe = write_recipe(tmp_path, base, shards, "zero1", lora={"rank": 4, "base": "bfloat16"})
    run_ranks(call, 2, recipe, BF16, "run.samples=32")
    run_ranks(call, 2, recipe, BF16)  # a resumed run rounds nothing twice
    assert export.main([str(run), str(run / "adapter")]) == 0
    assert export.main([str(run), str(run / "export"), "--merge"]) == 0
    in_peft = plain(PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(run / "adapter")), base)
    same(plain(AutoModel.from_pretrained(run / "export"), run / "export"), in_peft)
    evaluated, _ = evaluate.load_model(str(run))
    same(ours(evaluated, evaluated), in_peft)
    again = build(
        ModelSettings(path=str(base), lora=LoraSettings(rank=4, path=str(run / "adapter")))
    ).eval()  # the digest is the base's
    same(ours(again, again), in_peft)


def test_a_rounded_base_is_refused_where_it_would_not_be_exact(shards: Path, tmp_path: Path) -> None:
    tiny_pretrained("siglip", tmp_path / "base")
    recipe = write_recipe(tmp_path, tmp_path / "base", shards, "zero1", lora={"rank": 4, "base": "bfloat16"})
    for overrides, message in (
        ([], "is for towers that compute in it"),
        (["model.lora.dora=true"], "leave base out, or dora"),
    ):
        [text] = run_ranks(mistake, 1, recipe, *overrides)
        assert message in text
        assert "\n" not in text


@pytest.mark.parametrize(("base", "stage"), [("int8", "zero0"), ("nf4", "zero1")])
def test_a_base_in_few_bits_is_trained_on_and_exported_for_the_base_itself(
    base: str, stage: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantize, "has_gpu", lambda: True)  # its CPU kernels compute the same, slowly
    path, run = tmp_path / "base", tmp_path / "run"
    before = ours(model := tiny_pretrained("siglip", path), model)
    recipe = write_recipe(tmp_path, path, shards, stage, lora={"rank": 4, "base": base})
    run_ranks(call, 2, recipe, BF16, "run.samples=32", "log.every=1")
    run_ranks(call, 2, recipe, BF16)
    run_ranks(
        call,
        2,
        recipe,
        BF16,
        "log.every=1",
        "batch.micro_batch=8",
        f"run.directory={tmp_path / 'single'}",
        "run.samples=32",
    )
    two, one = (curve(tmp_path / name)[0] for name in ("run", "single"))
    assert two == pytest.approx(one, rel=1e-2)  # to bf16's rounding, of a gradient that is summed over other pieces
    assert export.main([str(run), str(run / "adapter")]) == 0
    assert export.main([str(run), str(run / "export"), "--merge"]) == 0
    after = plain(PeftModel.from_pretrained(AutoModel.from_pretrained(path), str(run / "adapter")), path)
    same(plain(AutoModel.from_pretrained(run / "export"), run / "export"), after)
    assert all((new - old).abs().max() > 1e-3 for new, old in zip(after, before, strict=True))
    [text] = run_ranks(mistake, 1, write_recipe(tmp_path, path, shards, "zero3", lora={"rank": 4, "base": base}), BF16)
    assert "cannot be partitioned" in text


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_few_bits_without_a_gpu_are_refused(base: str, tmp_path: Path) -> None:
    tiny_pretrained("siglip", tmp_path)
    with pytest.raises(UserError, match=rf"model.lora.base {base} needs (bitsandbytes|a GPU)") as error:
        build(ModelSettings(path=str(tmp_path), lora=LoraSettings(base=base)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", ["zero0", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_with_its_adapter(stage: str, shards: Path, tmp_path: Path) -> None:
    tiny_pretrained("siglip", tmp_path / "base")
    recipe = write_recipe(tmp_path, tmp_path / "base", shards, stage, lora={"rank": 4, "dropout": 0.1})
    run_ranks(call, 2, recipe, f"run.directory={tmp_path / 'whole'}")
    run_ranks(stopped_at_step, 2, 2, recipe)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "samples-000000032"
    run_ranks(call, 2, recipe)
    found, expected = (
        load_file(tmp_path / run / "checkpoints" / "samples-000000048" / "model.safetensors")
        for run in ("run", "whole")
    )
    assert any(".lora_B." in name and value.abs().max() > 0 for name, value in found.items())
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
