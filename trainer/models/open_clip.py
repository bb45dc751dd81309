"""open_clip's checkpoints, in and out: ViT CLIPs and SigLIPs become the Hugging Face modules that are trained here.

    model: {path: /models/ViT-B-16-SigLIP}        # open_clip_config.json, open_clip_model.safetensors, its tokenizer

``read_config`` and ``read_weights`` take such a directory, ``write`` makes one that open_clip loads by
``local-dir:FOLDER``. What transformers' CLIP and SigLIP cannot compute exactly (ResNets, CoCa, class tokens in the
text, layer scale, ...) is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, normalizers
from torch import Tensor
from transformers import PretrainedConfig

from trainer.core.types import Preprocess, UserError
from trainer.models.hf_errors import reading
from trainer.models.open_clip_config import to_open_clip_cfg, to_transformers
from trainer.models.open_clip_names import to_hugging_face, to_open_clip

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PICKLES = (".pt", ".bin", ".pth")
CONVERT = (
    "python -c \"import torch; from safetensors.torch import save_file; d = torch.load('{source}', map_location='cpu', "
    "weights_only=True); d = d.get('state_dict', d); save_file({{k.removeprefix('module.'): v.contiguous() for k, v in "
    "d.items()}}, '{target}')\""
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def is_open_clip(path: str | None) -> bool:
    """Whether ``path`` is an open_clip directory without a transformers model. Raises UserError for a pickle."""
    if path is None:
        return False
    folder = Path(path)
    if folder.suffix in PICKLES and folder.is_file():
        target = folder.with_suffix(".safetensors").name
        raise UserError(
            f"model.path {path!r} is a pickle, which can run code when loaded; if you trust it, convert it: "
            f"{CONVERT.format(source=path, target=target)}; then put it as {WEIGHTS} beside an {CONFIG}"
        )
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_config(path: str) -> PretrainedConfig:
    """transformers' config of the model in an open_clip directory; what open_clip said stays in its ``open_clip``.
    Raises UserError."""
    tree = _tree(path)
    with reading("model.path", path, "its weights"), safe_open(_weights(path), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    config = to_transformers(tree["model_cfg"], shapes, f"model.path {path!r}: {CONFIG}:")
    config.open_clip = {key: tree[key] for key in ("model_cfg", "preprocess_cfg") if key in tree}
    return config


def read_weights(path: str, config: PretrainedConfig) -> dict[str, Tensor]:
    """Weights by transformers' names, float32."""
    with reading("model.path", path, "its weights"), safe_open(_weights(path), "pt") as file:
        found = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    return to_hugging_face(found, config.model_type, f"model.path {path!r}")


def image_processor(path: str) -> Any:
    """The Hugging Face processor that does what open_clip's ``preprocess_cfg`` says."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tree = _tree(path)
    asked, side = tree.get("preprocess_cfg") or {}, tree["model_cfg"]["vision_cfg"]["image_size"]
    mode, how = asked.get("resize_mode", "shortest"), asked.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or how not in RESAMPLE:
        raise UserError(
            f"model.path {path!r}: {CONFIG} resizes by {mode}, {how}; known: shortest or squash, {list(RESAMPLE)}"
        )
    common: dict[str, Any] = {
        "image_mean": list(asked.get("mean", MEAN)),
        "image_std": list(asked.get("std", STD)),
        "resample": RESAMPLE[how],
    }
    if mode == "squash":
        return SiglipImageProcessorPil(size={"height": side, "width": side}, **common)
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_center_crop=True, **common
    )


def clean_like_open_clip(tokenizer: Any, path: str) -> Any:
    """Gives the tokenizer the cleaning of captions that open_clip does before it: whitespace, lower case, and for
    SigLIP no punctuation. (Broken encodings and HTML entities, which open_clip also mends, are left to
    `data_tools`.)"""
    text = _tree(path)["model_cfg"].get("text_cfg", {})
    clean = (text.get("tokenizer_kwargs") or {}).get(
        "clean", "whitespace" if text.get("hf_tokenizer_name") else "lower"
    )
    steps: list[Any] = []
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    if clean in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer


def write(
    folder: Path, config: PretrainedConfig, weights: dict[str, Tensor], preprocess: Preprocess, tokenizer: Any
) -> None:
    """Writes the directory; ``weights`` by transformers' names, with ``logit_scale`` and, where there is one,
    ``logit_bias``. Raises UserError for a model that open_clip has no name for."""
    model = to_open_clip_cfg(config, "logit_bias" in weights)
    model["text_cfg"]["context_length"] = preprocess.num_tokens
    model["text_cfg"].setdefault("hf_tokenizer_name", str(folder))  # open_clip takes a local-dir's own in any case
    found = to_open_clip(weights, config.model_type)
    positions = "text.positional_embedding" if config.model_type == "siglip" else "positional_embedding"
    found[positions] = found[positions][: preprocess.num_tokens]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in found.items()}, folder / WEIGHTS)
    asked = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.resample,
        "resize_mode": "shortest" if preprocess.resize == "crop" else "squash",
    }
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": asked}, indent=2), encoding="utf-8")


def _tree(path: str) -> dict[str, Any]:
    with reading("model.path", path, CONFIG):
        tree = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or "model_cfg" not in tree:
        raise UserError(
            f"model.path {path!r}: {CONFIG} has no model_cfg: save the model as open_clip's hub directories are"
        )
    return tree


def _weights(path: str) -> Path:
    folder = Path(path)
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        source, target = folder / pickles[0], folder / WEIGHTS
        raise UserError(
            f"model.path {path!r} has a pickle ({pickles[0]}) and no {WEIGHTS}; if you trust it, convert it: "
            f"{CONVERT.format(source=source, target=target)}"
        )
    raise UserError(f"model.path {path!r} has no {WEIGHTS}: copy it there, beside {CONFIG}")
