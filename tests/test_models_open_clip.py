"""open_clip's checkpoints in and out, against open_clip itself with random weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from tests.support.open_clip_models import import_open_clip
from tests.support.tiny_models import WORDS, tiny_captions, tiny_model, tiny_tokenizer
from tests.test_models import as_pixels, photos
from trainer.core.types import UserError
from trainer.losses import SigmoidLoss
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lora import LoraSettings
from trainer.models.formats import save_open_clip
from trainer.models.open_clip import CONFIG, WEIGHTS, read_config

VOCABULARY = len(WORDS) + 3
TOWER: dict[str, Any] = {"width": 96, "layers": 3}
CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {**TOWER, "image_size": 16, "patch_size": 8, "head_width": 32},
    "text_cfg": {"width": 64, "layers": 2, "heads": 2, "context_length": 8, "vocab_size": VOCABULARY},
}
SIGLIP: dict[str, Any] = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 16,
        "timm_model_name": "vit_base_patch8_siglip_16",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "width": 96,
        "layers": 2,
        "heads": 12,
        "context_length": 8,
        "vocab_size": VOCABULARY,
        "no_causal_mask": True,
        "hf_tokenizer_name": "x",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}
QUICK = {**CLIP, "quick_gelu": True}
EOS = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "pool_type": "eos", "eos_id": VOCABULARY - 1}}
CASES = {"clip": CLIP, "quick gelu": QUICK, "end token": EOS, "siglip": SIGLIP}
CLIP_STATISTICS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def open_clip() -> Any:
    """The module, with a tiny SigLIP among timm's models."""
    module = import_open_clip()
    import timm

    def vit_base_patch8_siglip_16(pretrained: bool = False, **more: Any) -> Any:
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 12}
        fixed = {"class_token": False, "global_pool": "map"}
        more = {key: value for key, value in more.items() if key in ("num_classes", "global_pool")}
        return timm.models.vision_transformer.VisionTransformer(**{**sizes, **fixed, **more})

    vit_base_patch8_siglip_16.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_base_patch8_siglip_16)
    return module


@torch.no_grad()
def leave(open_clip: Any, config: dict[str, Any], folder: Path, tokenizer: Any = None) -> Any:
    """Builds open_clip's model with random weights, leaves it as a hub directory would be, and returns it."""
    torch.manual_seed(3)
    tree = copy.deepcopy(config)
    custom = tree.pop("custom_text", False)
    theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**tree).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which no mistake would show in
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.logit_scale.fill_(2.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, folder / WEIGHTS)
    mean, std = ([0.5] * 3, [0.5] * 3) if custom else CLIP_STATISTICS
    mode = "squash" if custom else "shortest"
    asked = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": mode}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": asked}))
    (tokenizer or PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer())).save_pretrained(folder)
    return theirs


@torch.no_grad()
def same(theirs: Any, ours: DualEncoder, tokenize: Any = None, rows: int = 3) -> None:
    pixels = as_pixels(photos(rows, size=ours.preprocess.image_size[0]))
    captions = tiny_captions(rows)
    tokens, mask = ours.preprocess.tokenize(captions)
    image = theirs.encode_image(pixels * ours.pixel_scale + ours.pixel_shift, normalize=True)
    text = theirs.encode_text(tokens if tokenize is None else tokenize(captions), normalize=True)
    z = ours.eval()(pixels, tokens, mask)
    torch.testing.assert_close(z.image, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.text, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.scale, theirs.logit_scale.exp().reshape(1))
    bias = 0.0 if theirs.logit_bias is None else float(theirs.logit_bias)
    assert float(z.bias) == pytest.approx(bias)


def finetune(model: DualEncoder) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pixels = as_pixels(photos(4, size=model.preprocess.image_size[0]))
    for _ in range(2):
        optimizer.zero_grad()
        SigmoidLoss()(model(pixels, *model.preprocess.tokenize(tiny_captions(4)))).backward()
        optimizer.step()


def back_in_open_clip(open_clip: Any, model: DualEncoder, folder: Path) -> None:
    save_open_clip(model, folder, model.state_dict())
    again = open_clip.create_model(f"local-dir:{folder}").eval()
    same(again, model, open_clip.get_tokenizer(f"local-dir:{folder}"))
    same(again, DualEncoder.from_pretrained(folder))


@pytest.mark.parametrize("case", CASES)
def test_in_finetuned_and_out_again(case: str, open_clip: Any, tmp_path: Path) -> None:
    theirs = leave(open_clip, CASES[case], tmp_path / "in")
    model = DualEncoder.from_pretrained(tmp_path / "in")
    same(theirs, model)
    preprocess = model.preprocess
    assert (preprocess.resize, preprocess.resample) == ("squash" if case == "siglip" else "crop", "bicubic")
    assert preprocess.mean == pytest.approx((0.5,) * 3 if case == "siglip" else CLIP_STATISTICS[0])
    before = model(pixels=as_pixels(photos(2))).image
    finetune(model)
    assert (model.eval()(pixels=as_pixels(photos(2))).image - before).abs().max() > 1e-4
    back_in_open_clip(open_clip, model, tmp_path / "out")
    model.save_pretrained(tmp_path / "plain")  # and by way of Hugging Face's directory
    back_in_open_clip(open_clip, DualEncoder.from_pretrained(tmp_path / "plain"), tmp_path / "second")


def test_an_adapter_is_merged_into_it(open_clip: Any, tmp_path: Path) -> None:
    leave(open_clip, SIGLIP, tmp_path / "in")
    model = build(ModelSettings(path=str(tmp_path / "in"), lora=LoraSettings(rank=2)))
    finetune(model)
    back_in_open_clip(open_clip, model, tmp_path / "out")


def test_a_model_of_hugging_face_goes_out(open_clip: Any, tmp_path: Path) -> None:
    """Its sizes alone tell, without what open_clip once said of it."""
    back_in_open_clip(open_clip, tiny_model("clip"), tmp_path / "out")
    with pytest.raises(UserError, match="timm's sizes alone, none of 2 layers of 32"):
        back_in_open_clip(open_clip, tiny_model("siglip"), tmp_path)


def test_captions_are_cleaned_as_open_clip_does(open_clip: Any, tmp_path: Path) -> None:
    captions = ["A  RED cat!", "the_blue\tdog, a tree.", "Small (old) house?", ""]
    leave(open_clip, SIGLIP, tmp_path / "in")
    ours = DualEncoder.from_pretrained(tmp_path / "in").preprocess.tokenize(captions)[0]
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'in'}")(captions)
    assert ours.tolist() == theirs.tolist()
    assert ours[0, 1].item() == AutoTokenizer.from_pretrained(tmp_path / "in").get_vocab()["red"]


def test_what_cannot_be_computed_exactly_is_refused_by_name(open_clip: Any, tmp_path: Path) -> None:
    leave(open_clip, CLIP, tmp_path)
    tree = json.loads((tmp_path / CONFIG).read_text())
    for part, change, message in (
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "a ResNet"),
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name"),
        ("text_cfg", {"pool_type": "first"}, "pool_type is 'first'"),
        ("vision_cfg", {"timm_model_name": "vit_medium_patch16_gap_256"}, "none of timm's SigLIP towers"),
        ("vision_cfg", {"layers": 5}, "cannot be read there"),
    ):
        model = {**tree["model_cfg"], part: {**tree["model_cfg"][part], **change}}
        (tmp_path / CONFIG).write_text(json.dumps({**tree, "model_cfg": model}))
        with pytest.raises(UserError, match=message) as error:
            DualEncoder.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


def test_a_pickle_is_refused_with_the_line_that_converts_it(
    open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = leave(open_clip, CLIP, tmp_path)
    pickled, read = tmp_path / "open_clip_pytorch_model.bin", tmp_path / WEIGHTS
    state = {f"module.{name}": value for name, value in load_file(read).items()}  # as open_clip's trainer saves it
    torch.save({"epoch": 1, "state_dict": state}, pickled)
    read.unlink()
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        DualEncoder.from_pretrained(pickled)
    with pytest.raises(UserError, match="has a pickle") as error:
        DualEncoder.from_pretrained(tmp_path)
    command = str(error.value).partition("python -c ")[2]
    assert command.startswith('"') and command.endswith('"')
    exec(command[1:-1], {})
    same(theirs, DualEncoder.from_pretrained(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-L-14-336"])
def test_open_clips_own_configs(name: str, open_clip: Any, tmp_path: Path) -> None:
    config = json.loads((Path(open_clip.__path__[0]) / "model_configs" / f"{name}.json").read_text())
    if "SigLIP" in name:
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer())
    else:
        own = open_clip.get_tokenizer(name)
        merges = sorted(own.bpe_ranks, key=lambda pair: own.bpe_ranks[pair])
        vocabulary = {
            {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): number
            for token, number in own.encoder.items()
        }
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    theirs = leave(open_clip, config, tmp_path / "in", tokenizer)
    model = DualEncoder.from_pretrained(tmp_path / "in")
    same(theirs, model, None if "SigLIP" in name else open_clip.get_tokenizer(name))
    assert read_config(str(tmp_path / "in")).vision_config.image_size == model.preprocess.image_size[0]
    finetune(model)
    back_in_open_clip(open_clip, model, tmp_path / "out")
