"""Which weight of open_clip is which of transformers': one table, read both ways.

A rule says that its weights, laid one after the other along the first dimension, are the same on both sides:
attention's one input projection here is a query, a key and a value projection there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.core.types import UserError


class Rule(NamedTuple):
    """``theirs`` (open_clip) and ``ours`` (transformers); ``*`` is the number of the layer. ``shares``: how ``theirs``
    divide the first dimension."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    shape: str = "same"
    """same, transposed, or with a leading 1 in open_clip (row)."""


def _pairs(theirs: str, ours: str, kinds: Iterable[str] = ("weight", "bias")) -> list[Rule]:
    return [Rule((f"{theirs}.{kind}",), (f"{ours}.{kind}",)) for kind in kinds]


def _layers(theirs: str, ours: str, names: tuple[str, ...]) -> list[Rule]:
    """``names``: open_clip's for the two norms, the joint input projection (``_`` or ``.`` before the kind), the output
    projection and the two linear layers."""
    norm1, norm2, joint, out, fc1, fc2 = (f"{theirs}.*.{name}" for name in names)
    rules = _pairs(norm1, f"{ours}.*.layer_norm1") + _pairs(norm2, f"{ours}.*.layer_norm2")
    for kind in ("weight", "bias"):
        mine = tuple(f"{ours}.*.self_attn.{part}_proj.{kind}" for part in "qkv")
        rules.append(Rule((f"{joint}{kind}",), mine))
    rules += _pairs(out, f"{ours}.*.self_attn.out_proj")
    return rules + _pairs(fc1, f"{ours}.*.mlp.fc1") + _pairs(fc2, f"{ours}.*.mlp.fc2")


BLOCK = ("ln_1", "ln_2", "attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
TIMM_BLOCK = ("norm1", "norm2", "attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2")
HEAD = "vision_model.head"
POOL = "visual.trunk.attn_pool"


def _text(prefix: str) -> list[Rule]:
    return [
        Rule((f"{prefix}token_embedding.weight",), ("text_model.embeddings.token_embedding.weight",)),
        Rule((f"{prefix}positional_embedding",), ("text_model.embeddings.position_embedding.weight",)),
        *_layers(f"{prefix}transformer.resblocks", "text_model.encoder.layers", BLOCK),
        *_pairs(f"{prefix}ln_final", "text_model.final_layer_norm"),
    ]


SCALARS = [Rule(("logit_scale",), ("logit_scale",)), Rule(("logit_bias",), ("logit_bias",))]
RULES: dict[str, list[Rule]] = {
    "clip": [
        Rule(("visual.class_embedding",), ("vision_model.embeddings.class_embedding",)),
        Rule(("visual.positional_embedding",), ("vision_model.embeddings.position_embedding.weight",)),
        Rule(("visual.conv1.weight",), ("vision_model.embeddings.patch_embedding.weight",)),
        *_pairs("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_layers("visual.transformer.resblocks", "vision_model.encoder.layers", BLOCK),
        *_pairs("visual.ln_post", "vision_model.post_layernorm"),
        Rule(("visual.proj",), ("visual_projection.weight",), shape="transposed"),
        *_text(""),
        Rule(("text_projection",), ("text_projection.weight",), shape="transposed"),
        *SCALARS,
    ],
    "siglip": [
        *_pairs("visual.trunk.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        Rule(("visual.trunk.pos_embed",), ("vision_model.embeddings.position_embedding.weight",), shape="row"),
        *_layers("visual.trunk.blocks", "vision_model.encoder.layers", TIMM_BLOCK),
        *_pairs("visual.trunk.norm", "vision_model.post_layernorm"),
        Rule((f"{POOL}.latent",), (f"{HEAD}.probe",)),
        *(
            Rule((f"{POOL}.q.{kind}", f"{POOL}.kv.{kind}"), (f"{HEAD}.attention.in_proj_{kind}",), (1, 2))
            for kind in ("weight", "bias")
        ),
        *_pairs(f"{POOL}.proj", f"{HEAD}.attention.out_proj"),
        *_pairs(f"{POOL}.norm", f"{HEAD}.layernorm"),
        *_pairs(f"{POOL}.mlp.fc1", f"{HEAD}.mlp.fc1"),
        *_pairs(f"{POOL}.mlp.fc2", f"{HEAD}.mlp.fc2"),
        *_text("text."),
        *_pairs("text.text_projection", "text_model.head"),
        *SCALARS,
    ],
}  # fmt: skip


def to_hugging_face(weights: dict[str, Tensor], model_type: str, where: str) -> dict[str, Tensor]:
    """open_clip's weights by transformers' names. Raises UserError where one is left over or missing."""
    weights = dict(weights)
    if (
        model_type == "clip" and "text.positional_embedding" in weights
    ):  # a CustomTextCLIP: the same weights, a level down
        weights = {name.removeprefix("text."): value for name, value in weights.items()}
    weights.pop("attn_mask", None)
    return _convert(
        weights, RULES[model_type], lambda rule: (rule.theirs, rule.ours, (1,) * len(rule.ours)), where, False
    )


def to_open_clip(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """transformers' weights by open_clip's names."""
    return _convert(weights, RULES[model_type], lambda rule: (rule.ours, rule.theirs, rule.shares), "the model", True)


def _convert(
    weights: dict[str, Tensor],
    rules: list[Rule],
    sides: Callable[[Rule], tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]],
    where: str,
    back: bool,
) -> dict[str, Tensor]:
    left, found = dict(weights), {}
    for rule in rules:
        sources, targets, shares = sides(rule)
        for layer in _numbers(sources[0], left):
            names = [source.replace("*", layer) for source in sources]
            missing = [name for name in names if name not in left]
            if missing:
                raise UserError(f"{where}: its weights lack {missing[0]}")
            joint = torch.cat([left.pop(name) for name in names]) if len(names) > 1 else left.pop(names[0])
            if rule.shape == "transposed":
                joint = joint.T
            elif rule.shape == "row":
                joint = joint[None] if back else joint[0]
            part = joint.shape[0] // sum(shares) if joint.ndim else 0
            parts = [joint] if len(targets) == 1 else joint.split([part * share for share in shares])
            found.update({target.replace("*", layer): value for target, value in zip(targets, parts, strict=True)})
    if left:
        raise UserError(f"{where}: its weights hold {sorted(left)[0]}, which has no place in this model")
    return found


def _numbers(source: str, names: Iterable[str]) -> list[str]:
    """The layers that ``source`` stands for; one empty string where it is a name as it is and present."""
    if "*" not in source:
        return [""] if source in names else []
    pattern = re.compile(re.escape(source).replace(r"\*", r"(\d+)"))
    return [match[1] for name in names if (match := pattern.fullmatch(name))]
