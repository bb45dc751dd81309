"""LoRA (arXiv 2106.09685) through PEFT: the adapter that is trained here is a plain PEFT adapter of the plain Hugging
Face model.

model:
  path: openai/clip-vit-large-patch14-336
  lora: {rank: 16, targets: [q_proj, v_proj], towers: both}
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import xxhash
from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.core.settings import Settings
from trainer.core.types import UserError
from trainer.models.adapt.positions import TEXT_POSITIONS
from trainer.models.hf_errors import reading
from trainer.models.param_groups import tower_of
from trainer.models.pooling import empty_towers

SIDECAR = "ringlip.json"
"""A file beside PEFT's two, for what PEFT does not record: the base's digest, the temperature and the bias."""


class LoraSettings(Settings):
    """A low-rank adapter; the pretrained weights stay as they are."""

    rank: int = Field(default=16, gt=0)
    "Rank r of the update B A."
    alpha: float = Field(default=32.0, gt=0)
    "The update is scaled by alpha / r (by alpha / sqrt(r) with rslora)."
    dropout: float = Field(default=0.0, ge=0, lt=1)
    "Dropout on the adapter's input."
    targets: str | list[str] = "all-linear"
    """Modules that get an adapter: all-linear, a list of names (q_proj, fc1, ... or longer ones), or one regular
    expression on full names."""
    towers: Literal["both", "image", "text"] = "both"
    "Which tower gets adapters; the other one does not change."
    rslora: bool = False
    "Rank-stabilised scaling (arXiv 2312.03732)."
    dora: bool = False
    "Weight-decomposed LoRA (arXiv 2402.09353): slower, often better at low rank."
    modules_to_save: tuple[str, ...] = ()
    "Modules that are trained in full and saved with the adapter, such as visual_projection."
    path: str | None = None
    "An adapter directory to start from; its base must be this model."
    base: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "float32"
    """Format of the frozen weights during training. bfloat16 halves their memory and leaves bf16 training
    bit-identical, as does float16 for fp16 training; int8 and nf4 round (GPU, bitsandbytes)."""

    @model_validator(mode="after")
    def _dora_reads_weights(self) -> LoraSettings:
        if self.dora and self.base != "float32":
            raise ValueError(
                "dora computes with the base's weights, which lora.base would round: leave base out, or dora"
            )
        return self


class Targets(NamedTuple):
    """Full names of modules that get an adapter, and of those that were requested but cannot have one."""

    chosen: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        out = f"; left out: {', '.join(self.left_out)} (read without being called, would never learn)"
        return f"LoRA on {len(self.chosen)} modules{out if self.left_out else ''}"


def choose_targets(towers: PreTrainedModel, settings: LoraSettings) -> Targets:
    """Resolves ``targets`` against the model. For a name that does not exist, raises UserError with the nearest
    names."""
    inside = {name for name, module in towers.named_modules() if settings.towers in ("both", tower_of(name))}
    linear = [name for name, module in towers.named_modules() if name in inside and isinstance(module, nn.Linear)]
    # nn.MultiheadAttention (SigLIP's pooling head) reads out_proj.weight without calling it: an adapter there would
    # never learn.
    unfit = {f"{name}.out_proj" for name, module in towers.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if settings.targets == "all-linear":
        matched = linear
    elif isinstance(settings.targets, str):
        try:
            matched = [name for name in linear if re.fullmatch(settings.targets, name)]
        except re.error as error:
            raise UserError(f"model.lora.targets {settings.targets!r} is not a regular expression ({error})") from error
        if not matched:
            raise _unknown(settings.targets, linear)
    else:
        matched = []
        for target in settings.targets:
            found = [name for name in linear if name == target or name.endswith("." + target)]
            if not found:
                raise _unknown(target, linear)
            matched += [name for name in found if name not in matched]
    chosen = [name for name in matched if name not in unfit]
    if not chosen:
        raise UserError(
            f"model.lora.targets {settings.targets!r} names only {', '.join(matched)}, which cannot learn an adapter"
        )
    return Targets(chosen, [name for name in matched if name in unfit])


def _unknown(target: str, linear: list[str]) -> UserError:
    short = sorted({name.rsplit(".", 1)[-1] for name in linear})
    close = (
        difflib.get_close_matches(target, short, n=3, cutoff=0.4)
        or difflib.get_close_matches(target, linear, n=3, cutoff=0.4)
        or short
    )
    return UserError(
        f"model.lora.targets: no linear module {target!r} in the chosen towers; nearest: {', '.join(close)}"
    )


def add_lora(towers: PreTrainedModel, settings: LoraSettings, stretched: bool = False) -> Targets:
    """Injects a fresh adapter, which changes nothing yet; all else of ``towers`` is frozen, except text position
    embeddings that were ``stretched``, where the text tower is adapted. Names of parameters grow ``base_layer``,
    ``lora_A.default``, ``lora_B.default``.
    """
    targets = choose_targets(towers, settings)
    names = {part for name, _ in towers.named_modules() for part in (name, name.rsplit(".", 1)[-1])}
    for name in settings.modules_to_save:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            # PEFT ignores names that it does not find; it never finds a bare parameter such as logit_scale.
            raise UserError(f"model.lora.modules_to_save: no module {name!r}; nearest: {', '.join(close) or 'none'}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets.chosen,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
        base_model_name_or_path=towers.config._name_or_path or None,
    )
    LoraModel(towers, config, "default")
    if stretched and settings.towers != "image":
        towers.get_submodule(TEXT_POSITIONS).requires_grad_(True)
    for module in towers.modules():
        if isinstance(module, LoraLayer):
            # PEFT would copy a bf16 input to float32 for the adapter, and autocast back: a copy kept for each of q, k
            # and v instead of one.
            module.cast_input_dtype_enabled = False
    return targets


def hold_base(towers: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keeps the weights that autocast rounds in every forward anyway (frozen linear layers and convolutions) in
    ``dtype`` for good.

    Norms, embeddings and the projections inside nn.MultiheadAttention are read in float32 and stay so: the numbers of
    training under autocast to ``dtype`` do not change. The adapter, the temperature and the bias are float32.
    """
    for module in towers.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def base_digest(towers: PreTrainedModel, state: dict[str, Tensor] | None = None) -> str | None:
    """A digest of the base model's float32 weights, whether it has an adapter or not; None on the meta device."""
    digest = xxhash.xxh3_128()
    plain = {}
    for name, value in (towers.state_dict() if state is None else state).items():
        if value.is_meta:
            return None
        if ".lora_" not in name and ".modules_to_save." not in name:
            plain[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    for name in sorted(plain):
        value = plain[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def save_adapter(
    towers: PreTrainedModel, folder: Path, state: dict[str, Tensor], base: str | None, extra: dict[str, Any]
) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``, which ``peft.PeftModel.from_pretrained(base,
    folder)`` loads.

    ``state`` holds full weights by the names of ``towers``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    peft_config: dict[str, LoraConfig] = towers.peft_config  # type: ignore[assignment]
    config = peft_config["default"]
    found = get_peft_model_state_dict(towers, state_dict=state, save_embedding_layers=False)
    weights = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in found.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    was, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = was
    record = {"format": "ringlip-adapter", "base": base or base_digest(towers, state), **extra}
    (folder / SIDECAR).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_sidecar(folder: str) -> dict[str, Any]:
    """The content of the sidecar file; empty for an adapter that was trained elsewhere."""
    path = Path(folder) / SIDECAR
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_adapter(towers: PreTrainedModel, folder: str, base: str | None) -> None:
    """Loads the weights of an adapter directory into the injected adapter. Raises UserError if it belongs to another
    base."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(
            f"model.lora.path {folder!r} holds no adapter_model.safetensors: give the directory that PEFT or RingLIP "
            f"wrote"
        )
    with reading("model.lora.path", folder, "the adapter"):
        recorded, saved = read_sidecar(folder).get("base"), load_file(path)
    if recorded and base and recorded != base:
        raise UserError(
            f"model.lora.path {folder!r} was trained on another base (digest {recorded[:12]}, this model's weights "
            f"{base[:12]}): set model.path to the model it was trained on"
        )
    weights = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    shapes = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(towers, save_embedding_layers=False).items()
    }
    if shapes != {name: tuple(value.shape) for name, value in weights.items()}:
        odd = sorted(set(shapes) ^ set(weights)) or sorted(
            name for name in shapes if shapes[name] != tuple(weights[name].shape)
        )
        raise UserError(
            f"model.lora.path {folder!r} does not fit model.lora and its base: {odd[0]} differs; use the settings it "
            f"was trained with"
        )
    set_peft_model_state_dict(towers, weights)


def merged_weights(towers: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights with the adapter merged in, from ``state`` (full weights by the names of ``towers``);
    neither argument is modified."""
    adapted: Any = towers.peft_config["default"]
    plain: Any = empty_towers(towers)
    with torch.device("meta"):
        for name in ("logit_scale", "logit_bias"):
            if hasattr(plain, name):
                delattr(plain, name)
        tuner = LoraModel(plain, adapted, "default")
    plain.load_state_dict({name: value.detach().cpu().float().clone() for name, value in state.items()}, assign=True)
    return tuner.merge_and_unload().state_dict()
