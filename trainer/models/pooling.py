"""Pools a tower's output to one vector per image or caption: ``model.image.pooling`` and ``model.text.pooling``.

    model:
      image: {path: facebook/dinov2-base}
      text: {path: sentence-transformers/all-MiniLM-L6-v2}        # auto: mean, as its 1_Pooling/config.json says

transformers' VisionTextDualEncoderModel uses a tower's ``pooler_output`` only, so a pair with another pooling records
it in its config.json (``pooling``), and its model card shows how to pool in plain transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import cached_file

from trainer.core.types import UserError
from trainer.models.naflex import NAFLEX
from trainer.models.param_groups import Tower

Pooling = Literal["pooler", "mean", "cls", "last"]
SENTENCE_TRANSFORMERS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""sentence-transformers' names of these modes."""

SIGLIP = ("siglip", NAFLEX)
"""Families with a bias of their own and no projection size beside the text tower's."""


def embed_dim(towers: PreTrainedModel) -> int:
    """Width d of the embeddings that both towers end in."""
    config: Any = towers.config
    return config.text_config.projection_size if config.model_type in SIGLIP else config.projection_dim


def pool(output: Any, pooling: Pooling, mask: Tensor | None = None, special: int = 0) -> Tensor:
    """A tower's output -> [b, w].

    Args:
        output: a transformers model output with ``pooler_output`` [b, w] or ``last_hidden_state`` [b, n, w]
            ([b, w, h, w'] of a convolutional tower).
        mask: [b, n], true on real tokens; None: all are.
        special: tokens before the first patch (class and register tokens), which a mean leaves out.
    """
    if pooling == "pooler":
        return output.pooler_output
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden[:, special:].mean(dim=1) if pooling == "mean" else hidden[:, -1]
    if pooling == "mean":
        weights = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)  # wherever the tokenizer pads
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def pooling_of(config: PretrainedConfig, side: Tower) -> Pooling:
    """How a pair's tower is pooled; ``config`` is the pair's."""
    return getattr(config, "pooling", {}).get(side, "pooler")


def other_pooling(config: PretrainedConfig) -> str | None:
    """Describes the pooling of a pair that plain transformers pools differently; None if it does not."""
    sides: tuple[Tower, ...] = ("image", "text")
    odd = [f"{side}: {pooling_of(config, side)}" for side in sides if pooling_of(config, side) != "pooler"]
    return ", ".join(odd) or None


def special_tokens(vision: PretrainedConfig) -> int:
    """Tokens before the first patch: a class token, and DINOv2's and DINOv3's registers."""
    if getattr(vision, "patch_size", None) is None or hasattr(vision, "depths"):
        return 0
    return int(vision.model_type not in ("siglip_vision_model", "siglip2_vision_model")) + int(
        getattr(vision, "num_register_tokens", 0) or 0
    )


def choose_pooling(
    wanted: Pooling | Literal["auto"], path: str | None, config: PretrainedConfig, side: Tower
) -> Pooling:
    """The pooling of a tower, with ``auto`` resolved: as a sentence-transformers checkpoint says; else the pooled
    output, if the model has one and ``path`` has its weights; else the class token of an image tower, the last token of
    a causal language model, the mean of any other text model. Raises UserError.
    """
    key = f"model.{side}.pooling"
    if wanted == "auto" and path is not None and (found := _of_sentence_transformers(path, key)) is not None:
        return found
    has_pooler, needs_weights = _pooled_output(config.to_json_string(), side)
    if wanted == "pooler" and not has_pooler:
        raise UserError(f"{key}: {config.model_type} has no pooled output; take auto, mean, cls or last")
    if wanted in ("mean", "cls", "last") and "siglip" in config.model_type and side == "image":
        raise UserError(f"{key} {wanted}: SigLIP pools its patches by attention, which is trained; leave it out")
    if wanted == "cls" and side == "image" and special_tokens(config) == 0:
        raise UserError(f"{key} cls: {config.model_type} has no class token; take auto or mean")
    if wanted != "auto":
        return wanted
    if has_pooler and not (needs_weights and path is not None and _holds_pooler(path) is False):
        return "pooler"
    if side == "image":
        return "cls" if special_tokens(config) else "mean"
    masked, causal = type(config) in MODEL_FOR_MASKED_LM_MAPPING, type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return "last" if causal and not masked else "mean"


def drop_unused_poolers(towers: PreTrainedModel) -> None:
    """Removes the unused ``pooler`` of a tower: it would never get a gradient."""
    sides: tuple[tuple[Tower, str], ...] = (("image", "vision_model"), ("text", "text_model"))
    for side, name in sides:
        tower: Any = getattr(towers, name, None)
        if pooling_of(towers.config, side) != "pooler" and getattr(tower, "pooler", None) is not None:
            tower.pooler = nn.Identity()


def empty_towers(towers: PreTrainedModel) -> PreTrainedModel:
    """The same plain model on the meta device."""
    with torch.device("meta"):
        empty = type(towers)(towers.config)
    drop_unused_poolers(empty)
    return empty


def _of_sentence_transformers(path: str, key: str) -> Pooling | None:
    modules = _read_json(path, "modules.json")
    if modules is None:
        return None
    folder = next((module["path"] for module in modules if module["type"].endswith(".Pooling")), None)
    found = _read_json(path, f"{folder}/config.json") if folder is not None else None
    if found is None:
        return None
    modes = {
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, on in found.items()
        if name.startswith("pooling_mode_") and on
    }
    modes |= set(_listed(found.get("pooling_mode")))
    if len(modes) != 1 or not modes <= set(SENTENCE_TRANSFORMERS):
        raise UserError(
            f"{key}: {path!r} is pooled by {', '.join(sorted(modes)) or 'nothing'} in sentence-transformers; known "
            "here: "
            f"{', '.join(SENTENCE_TRANSFORMERS)}; choose {key} yourself"
        )
    return SENTENCE_TRANSFORMERS[modes.pop()]


def _listed(value: Any) -> Iterable[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _read_json(path: str, name: str) -> Any:
    found = _file(path, name)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _file(path: str, name: str) -> str | None:
    return cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def _holds_pooler(path: str) -> bool | None:
    """Whether a checkpoint has the weights of a pooler; None if that is unknown."""
    if (index := _read_json(path, "model.safetensors.index.json")) is not None:
        names: Iterable[str] = index["weight_map"]
    elif (single := _file(path, "model.safetensors")) is not None:
        with safe_open(single, "pt") as file:
            names = list(file.keys())
    else:
        return None
    return any("pooler." in name for name in names)


@functools.lru_cache(maxsize=16)
def _pooled_output(config_json: str, side: Tower) -> tuple[bool, bool]:
    """(Whether a model has a pooled output, whether that has weights), found by running the model on the meta
    device."""
    tree = json.loads(config_json)
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    if type(config) not in MODEL_MAPPING:
        return True, False  # a tower that transformers makes inside a SigLIP alone
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config).eval()
        if side == "image":
            size = getattr(config, "image_size", 224)
            size = size if isinstance(size, int) else max(size)
            output = model(pixel_values=torch.zeros(1, getattr(config, "num_channels", 3), size, size))
        else:
            output = model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    pooler = getattr(model, "pooler", None)
    needs_weights = isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters())
    return getattr(output, "pooler_output", None) is not None, needs_weights
