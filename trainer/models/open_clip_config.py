"""open_clip's ``model_cfg`` and transformers' configs, one from the other: sizes, activations, pooling, norms.

What transformers' CLIP and SigLIP do not compute, or open_clip has no name for, is refused by name.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import CLIPConfig, PretrainedConfig, SiglipConfig

from trainer.core.types import UserError

HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
"""Attention heads of timm's SigLIP towers, which weights do not show."""
SIZES = {(768, 12): "base", (1024, 24): "large", (1152, 27): "so400m", (1536, 40): "giantopt"}
TIMM = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
TANH = re.compile(r"vit_(giantopt_.*|so400m_patch16_.*|base_patch32_siglip_256|large_patch16_siglip_512)")
"""timm's towers whose GELU is the tanh approximation; the others' is exact."""
PLAIN_VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"}
PLAIN_TEXT = {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers", "mlp_ratio",
    "pool_type", "eos_id", "pad_id", "no_causal_mask", "proj_bias", "norm_kwargs", "act_kwargs", "proj_type",
}  # fmt: skip


def to_transformers(model: dict[str, Any], shapes: dict[str, list[int]], where: str) -> PretrainedConfig:
    """transformers' config of an open_clip model.

    Args:
        model: its ``model_cfg``.
        shapes: those of its weights by open_clip's names; timm's sizes are in no config.
        where: how errors begin.
    """
    vision, text = dict(model.get("vision_cfg", {})), dict(model.get("text_cfg", {}))
    for key, value in text.items():
        if key not in PLAIN_TEXT and value not in (None, False, 0):
            raise UserError(f"{where} text_cfg.{key} is {value!r}, which transformers' text towers do not compute")
    if text.get("proj_type", "linear") != "linear":
        raise UserError(f"{where} text_cfg.proj_type is {text['proj_type']!r}; only linear projections are known here")
    if "timm_model_name" in vision:
        return _siglip_config(where, model, vision, text, shapes)
    return _clip_config(where, model, vision, text)


def _clip_config(where: str, model: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> PretrainedConfig:
    for key, value in vision.items():
        if key not in PLAIN_VISION and value not in (None, False, 0) and (key, value) != ("pool_type", "tok"):
            raise UserError(f"{where} vision_cfg.{key} is {value!r}, which transformers' CLIP does not compute")
    if isinstance(vision.get("layers", 12), list):
        raise UserError(f"{where} vision_cfg.layers is a list: a ResNet, which transformers' CLIP does not have")
    if text.get("no_causal_mask") or text.get("proj_bias") or text.get("act_kwargs") or text.get("norm_kwargs"):
        raise UserError(
            f"{where} its text tower is not CLIP's (no_causal_mask, proj_bias, act_kwargs or norm_kwargs is set)"
        )
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos") or (pool == "eos" and text.get("eos_id", 2) == 2):
        raise UserError(
            f"{where} text_cfg.pool_type is {pool!r} (eos_id {text.get('eos_id', 2)}); known: argmax, or eos with an id"
        )
    act, joint = "quick_gelu" if model.get("quick_gelu") else "gelu", model["embed_dim"]
    width, wide = vision.get("width", 768), text.get("width", 512)
    return CLIPConfig(
        projection_dim=joint,
        vision_config={
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "hidden_act": act,
            "projection_dim": joint,
        },
        text_config={
            "hidden_size": wide,
            "intermediate_size": int(wide * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_act": act,
            "projection_dim": joint,
            "eos_token_id": 2 if pool == "argmax" else text["eos_id"],  # 2 makes transformers take the largest id
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
    )


def _siglip_config(
    where: str, model: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], shapes: dict[str, list[int]]
) -> PretrainedConfig:
    name = TIMM.fullmatch(vision["timm_model_name"])
    if name is None or vision.get("timm_pool") != "map" or vision.get("timm_proj") != "none":
        raise UserError(
            f"{where} the image tower {vision['timm_model_name']!r} is none of timm's SigLIP towers with map pooling"
        )
    if not (text.get("no_causal_mask") and text.get("proj_bias") and text.get("pool_type") == "last"):
        raise UserError(f"{where} its text tower is not SigLIP's (no_causal_mask, proj_bias and pool_type last)")
    try:
        width, *_ = shapes["visual.trunk.patch_embed.proj.weight"]
        hidden, *_ = shapes["visual.trunk.blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise UserError(f"{where} the weights beside it lack {error.args[0]}") from None
    depth = sum(re.fullmatch(r"visual\.trunk\.blocks\.\d+\.norm1\.weight", key) is not None for key in shapes)
    wide = text["width"]
    approximate = (text.get("act_kwargs") or {}).get("approximate", "none")
    return SiglipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": depth,
            "num_attention_heads": HEADS[name[1]],
            "image_size": vision["image_size"],
            "patch_size": int(name[2]),
            "hidden_act": "gelu_pytorch_tanh" if TANH.fullmatch(vision["timm_model_name"]) else "gelu",
        },
        text_config={
            "hidden_size": wide,
            "intermediate_size": int(wide * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_size": model["embed_dim"],
            "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
            "hidden_act": "gelu_pytorch_tanh" if approximate == "tanh" else "gelu",
            "bos_token_id": None,
            "eos_token_id": None,
        },
    )


def to_open_clip_cfg(config: PretrainedConfig, biased: bool) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a transformers config: what was read, or made from the sizes."""
    read = copy.deepcopy(getattr(config, "open_clip", {}).get("model_cfg"))
    if config.model_type not in ("clip", "siglip"):
        raise UserError(f"open_clip has no {config.model_type} model: export without --format open_clip")
    model = read or (_clip_cfg(config) if config.model_type == "clip" else _siglip_cfg(config))
    vision, side = model["vision_cfg"], config.vision_config.image_size
    if side != vision.get("image_size", 224):
        vision["image_size"] = side
        if "timm_model_name" in vision:
            vision["timm_model_name"] = re.sub(r"\d+$", str(side), vision["timm_model_name"])
    if biased:
        model.setdefault("init_logit_bias", -10)
    return model


def _clip_cfg(config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if acts not in ({"gelu"}, {"quick_gelu"}) or {vision.layer_norm_eps, text.layer_norm_eps} != {1e-5}:
        raise UserError(
            f"open_clip's CLIP has gelu or quick_gelu in both towers and norms of 1e-5, this model {sorted(acts)}"
        )
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            **({} if text.eos_token_id == 2 else {"pool_type": "eos", "eos_id": text.eos_token_id}),
        },
    }


def _siglip_cfg(config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    size = SIZES.get((vision.hidden_size, vision.num_hidden_layers))
    name = f"vit_{size}_patch{vision.patch_size}_siglip_{vision.image_size}"
    exact = "gelu_pytorch_tanh" if TANH.fullmatch(name) else "gelu"
    if size is None or vision.num_attention_heads != HEADS[size]:
        raise UserError(
            f"open_clip has SigLIP image towers of timm's sizes alone, none of {vision.num_hidden_layers} layers of "
            f"{vision.hidden_size}: export without --format open_clip"
        )
    if vision.hidden_act != exact:
        raise UserError(
            f"open_clip runs {name} with {exact}, this model has {vision.hidden_act}: its embeddings would differ; "
            "export "
            "without --format open_clip, or start from open_clip's checkpoint"
        )
    return {
        "embed_dim": text.projection_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": text.layer_norm_eps},
            **({"act_kwargs": {"approximate": "tanh"}} if text.hidden_act == "gelu_pytorch_tanh" else {}),
        },
    }
