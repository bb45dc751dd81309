"""Saves a trained model as a plain transformers directory, or an adapter as a plain PEFT directory.

``state`` has full float32 weights by the DualEncoder's parameter names, because the module itself may have only a
partition of them (ZeRO-3).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.core.types import UserError
from trainer.models.adapt.bottleneck import widened
from trainer.models.adapt.lora import merged_weights, save_adapter
from trainer.models.card import whole_card
from trainer.models.pooling import SIGLIP, empty_towers
from trainer.models.preprocess import make_processor
from trainer.models.towers import quietly

if TYPE_CHECKING:
    from trainer.models.dual_encoder import DualEncoder


def save_pretrained(model: DualEncoder, folder: Path, state: dict[str, Tensor]) -> None:
    """Writes a plain Hugging Face directory: ``AutoModel`` and ``AutoProcessor`` load it without RingLIP. An adapter is
    merged."""
    weights = plain_weights(model, state)
    scale, bias = state["head.logit_scale"], state.get("head.logit_bias")
    siglip = model.family in SIGLIP
    weights["logit_scale"] = scale.reshape(1) if siglip else scale.reshape(())
    config = model.towers.config
    if siglip:
        weights["logit_bias"] = (torch.zeros(1) if bias is None else bias).reshape(1)
    elif bias is not None:
        config.logit_bias = float(bias)  # transformers has no such parameter there; RingLIP reads it from the config
    config.architectures = [type(model.towers).__name__]
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with quietly():
        empty_towers(model.towers).save_pretrained(folder, state_dict=weights)
        make_processor(model.preprocess, config).save_pretrained(folder)
    (folder / "README.md").write_text(whole_card(model, str(folder), [], ""), encoding="utf-8")


def plain_weights(model: DualEncoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The towers' weights by transformers' names: an adapter merged, a bottleneck multiplied out."""
    weights = _tower_state(state)
    if model.settings.token_bottleneck:
        weights = widened(weights)
    if model.settings.lora is not None:
        with quietly():
            weights = merged_weights(model.towers, weights)
    return weights


def save_adapter_of(model: DualEncoder, folder: Path, state: dict[str, Tensor]) -> None:
    """Writes a plain PEFT adapter of the base model, with the temperature, the bias and the base's digest beside it,
    and the processor that it was trained with."""
    if model.settings.lora is None:
        raise UserError("model.lora is not set: there is no adapter to save; export the whole model")
    if model.trains_positions:
        raise UserError(
            "model.num_tokens stretched the text position embeddings, which an adapter does not contain: add --merge"
        )
    scale, bias = state["head.logit_scale"], state.get("head.logit_bias")
    head = {"logit_scale": float(scale), "logit_bias": None if bias is None else float(bias)}
    save_adapter(model.towers, folder, _tower_state(state), model.base, head)
    with quietly():
        make_processor(model.preprocess, model.towers.config).save_pretrained(folder)


def _tower_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("towers."): value for name, value in state.items() if name.startswith("towers.")}
