"""The dual encoder: two towers, a temperature and a bias. Maps images and captions to embeddings."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from trainer.core.types import Embeddings, Preprocess
from trainer.models.adapt.batch_norm import fixed_batch_norms
from trainer.models.adapt.bottleneck import narrow_embedding
from trainer.models.adapt.lock import lock_towers
from trainer.models.adapt.lora import add_lora, base_digest, hold_base, load_adapter, read_sidecar
from trainer.models.adapt.mask import drop_patches, drop_tokens
from trainer.models.adapt.positions import TEXT_POSITIONS
from trainer.models.adapt.quantize import QUANTIZED, quantize
from trainer.models.adapt.recompute import recompute
from trainer.models.naflex import NAFLEX, patch_inputs, unpack
from trainer.models.param_groups import ParameterGroup, RateSettings, Tower, parameter_groups, tower_of
from trainer.models.pooling import embed_dim, pool, pooling_of, special_tokens
from trainer.models.precomputed import locked_part, precomputed_tower, remove_tower
from trainer.models.preprocess import read_preprocess, read_tokenizer, warn_of_mask
from trainer.models.save import save_adapter_of, save_pretrained
from trainer.models.settings import ModelSettings
from trainer.models.towers import make_config, make_towers, quietly, read_config, take_scale_bias
from trainer.models.vision_text import PAIR

logger = logging.getLogger(__name__)


class Head(nn.Module):
    """The temperature t = exp(t') and the bias b, both [1].

    A module of its own, because ZeRO-3 gathers parameters around the forward of the module that has them. It returns
    computed tensors, because a parameter itself would be empty outside of forward.
    """

    def __init__(self, log_scale: float, bias: float | None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([log_scale]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(t [1], b [1]) float32; b is a constant zero for a model without one."""
        scale = self.logit_scale.float().exp()
        return scale, torch.zeros_like(scale) if self.logit_bias is None else self.logit_bias.float() + 0.0


class DualEncoder(nn.Module):
    """A Hugging Face CLIP or SigLIP model as RingLIP trains it.

    ``towers`` is the plain transformers model without its temperature and bias, which live in ``head``; ``preprocess``
    says how the loader must make its inputs.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(
        self,
        towers: PreTrainedModel,
        head: Head,
        preprocess: Preprocess,
        settings: ModelSettings,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.towers, self.head, self.preprocess, self.settings = towers, head, preprocess, settings
        self.base = base  # the digest of the model that an adapter belongs to
        self.unsaved: frozenset[str] = frozenset()
        """Parameters that checkpoints of this model lack, because training ran without them ..."""
        self.tower = preprocess.precomputed.fingerprint if preprocess.precomputed is not None else ""
        """... and the fingerprint of the precomputed tower that they belong to."""
        self._lent: tuple[DualEncoder, ...] = ()  # in a tuple it is not a submodule, and DeepSpeed does not see it
        self.patch_drop = drop_patches(towers, settings.mask)
        self.token_drop = drop_tokens(settings.mask, preprocess.num_tokens)
        self.batch_norms = fixed_batch_norms(
            towers, pretrained=settings.image is None or settings.image.path is not None
        )
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("pixel_scale", (1 / (255 * std)).reshape(3, 1, 1), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).reshape(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DualEncoder:
        """The model in a Hugging Face directory or on the hub, with its own temperature and bias."""
        return build(ModelSettings(path=str(path)))

    @property
    def family(self) -> str:
        """Hugging Face's ``model_type``."""
        return self.towers.config.model_type

    @property
    def embed_dim(self) -> int:
        """Width d of the embeddings."""
        return embed_dim(self.towers)

    def forward(
        self, pixels: Tensor | None = None, tokens: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Embeddings:
        """Embeds what is given: ``pixels`` [b, 3, h, w] uint8, ``tokens`` [b, n] int64, ``token_mask`` [b, n] bool.

        The embeddings are float32 and of length 1, whatever autocast computes in; a tower without input gives [0, d].
        """
        scale, bias = self.head()
        image = scale.new_zeros(0, self.embed_dim) if pixels is None else self.embed_images(pixels)
        text = scale.new_zeros(0, self.embed_dim) if tokens is None else self.embed_texts(tokens, token_mask)
        return Embeddings(image, text, scale, bias)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """[b, 3, h, w] uint8 (strips of patches for NaFlex), or precomputed outputs of the tower [b, k] -> [b, d]
        float32 of length 1."""
        if pixels.is_floating_point():
            return self._finish("image", pixels)
        if self._absent == "image":
            return self._finish("image", self._lent[0].tower_output("image", pixels))
        if self.family == PAIR:
            return self._finish("image", self._pooled_image(pixels))
        towers: Any = self.towers
        if self.family == NAFLEX:
            patches, grids = unpack(pixels)
            scale, shift = self.pixel_scale[:, None], self.pixel_shift[:, None]
            inputs = patch_inputs(patches * scale + shift, grids)
        else:
            inputs = {"pixel_values": pixels * self.pixel_scale + self.pixel_shift}
        return normalize(towers.get_image_features(**inputs).pooler_output.float(), dim=-1)

    def embed_texts(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """[b, n] int64, or precomputed outputs of the tower [b, k] -> [b, d] float32 of length 1.

        Only the text model of a pair uses ``token_mask``: SigLIP attends to padding by design, and CLIP, being causal,
        reads the embedding at the end token, before any padding. Without a mask attention takes its fast path.
        """
        if tokens.is_floating_point():
            return self._finish("text", tokens)
        if self._absent == "text":
            return self._finish("text", self._lent[0].tower_output("text", tokens, token_mask))
        towers: Any = self.towers
        if self.token_drop is not None and self.token_drop.active and self.training:
            every = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
            tokens, token_mask = self.token_drop(tokens, every)
        if self.family == PAIR:
            return self._finish("text", self._pooled_text(tokens, token_mask))
        return normalize(towers.get_text_features(input_ids=tokens).pooler_output.float(), dim=-1)

    def tower_output(self, side: Tower, inputs: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The part of a locked tower that is precomputed: ``inputs`` -> [b, k] float32 (see models/precomputed.py)."""
        if self.family != PAIR:
            return self.embed_images(inputs) if side == "image" else self.embed_texts(inputs, token_mask)
        pooled = self._pooled_image(inputs) if side == "image" else self._pooled_text(inputs, token_mask)
        return pooled.float()

    def _pooled_image(self, pixels: Tensor) -> Tensor:
        towers: Any = self.towers
        output = towers.vision_model(pixel_values=pixels * self.pixel_scale + self.pixel_shift)
        special = special_tokens(towers.config.vision_config)
        return pool(output, pooling_of(towers.config, "image"), special=special)

    def _pooled_text(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        towers: Any = self.towers
        output = towers.text_model(input_ids=tokens, attention_mask=token_mask)
        return pool(output, pooling_of(towers.config, "text"), token_mask)

    def _finish(self, side: Tower, output: Tensor) -> Tensor:
        towers: Any = self.towers
        if self.family == PAIR:
            projection = towers.visual_projection if side == "image" else towers.text_projection
            output = projection(output.to(projection.weight.dtype))
        return normalize(output.float(), dim=-1)

    @property
    def _absent(self) -> Tower | None:
        return self.preprocess.precomputed.side if self.preprocess.precomputed is not None else None

    @contextmanager
    def with_every_tower(self) -> Iterator[None]:
        """Within the block, a precomputed tower is loaded onto the device: evaluation embeds images that have no
        stored embeddings."""
        if self._absent is None:
            yield
            return
        self._lent = (build(self.settings.without_precomputed_tower).to(self.pixel_scale.device).eval(),)
        try:
            yield
        finally:
            self._lent = ()

    def trains(self, tower: Tower) -> bool:
        """Whether any parameter of that tower is trainable; if not, its embeddings need no gradient."""
        return any(parameter.requires_grad for name, parameter in self.named_parameters() if tower_of(name) == tower)

    @property
    def trains_positions(self) -> bool:
        """Whether text position embeddings train: beside an adapter, those that were stretched."""
        return any(parameter.requires_grad and TEXT_POSITIONS in name for name, parameter in self.named_parameters())

    def parameter_groups(self, rates: RateSettings | None = None) -> list[ParameterGroup]:
        """The trainable parameters' names by learning-rate factor (``rates``: the settings' own) and decay."""
        adapter = self.settings.lora is not None
        return parameter_groups(self, self.towers, rates or self.settings.rates, self.family == PAIR, adapter)

    def progress(self, samples_seen: int, total_samples: int) -> None:
        """Call before each step: stops dropping patches and tokens when the last, unmasked part of the run begins."""
        for drop in (self.patch_drop, self.token_drop):
            if drop is not None:
                drop.progress(samples_seen, total_samples)

    def train(self, mode: bool = True) -> DualEncoder:
        """Sets training mode, but keeps a fully locked tower (no dropout) and batch norms (fixed statistics) in
        evaluation mode."""
        super().train(mode)
        for name in ("vision_model", "text_model"):
            tower = self.towers.get_submodule(name)
            if mode and not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        for layer in self.batch_norms:
            layer.eval()
        return self

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes a plain Hugging Face directory: see models/save.py."""
        save_pretrained(self, Path(folder), self.state_dict() if state is None else state)

    def save_adapter(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes a plain PEFT adapter of the base model: see models/save.py."""
        save_adapter_of(self, Path(folder), self.state_dict() if state is None else state)


def build(settings: ModelSettings, weights: bool = True) -> DualEncoder:
    """The model that a recipe's ``model:`` section describes, in float32 on the CPU (or the current default device).

    ``weights=False`` does not read a pretrained model's weights: to load a checkpoint next, or to plan on the meta
    device. Raises UserError for a path without a model, a tokenizer that does not match, or sizes that do not fit.
    """
    with quietly():
        if settings.path:
            read_config(settings.path)  # first, so that a wrong path is not reported as a missing tokenizer
        tokenizer = read_tokenizer(settings)
        config = make_config(settings, tokenizer)
        if settings.path and weights:
            warn_of_mask(settings.path, config, tokenizer)
        preprocess = read_preprocess(settings, config, tokenizer)
    positions = config.text_config.max_position_embeddings if settings.path else 0
    towers = make_towers(config, settings, weights)
    stretched = bool(settings.path) and towers.config.text_config.max_position_embeddings != positions
    if settings.token_bottleneck:
        narrow_embedding(towers, settings.token_bottleneck)
    log_scale, bias = take_scale_bias(towers, settings, pretrained=settings.path is not None)
    lock_towers(towers, settings.lock)
    base = None
    if settings.lora is not None:
        base = base_digest(towers) if weights else None
        if settings.lora.base in QUANTIZED:
            quantize(towers, settings.lora.base)
        with quietly():
            targets = add_lora(towers, settings.lora, stretched)
        if weights:  # the planner builds dozens without
            logger.info(str(targets))
        if settings.lora.path and weights:
            load_adapter(towers, settings.lora.path, base)
            recorded = read_sidecar(settings.lora.path)
            log_scale, bias = recorded.get("logit_scale", log_scale), recorded.get("logit_bias", bias)
        if settings.lora.base in ("bfloat16", "float16"):
            hold_base(towers, getattr(torch, settings.lora.base))
    recompute(towers.get_submodule("vision_model"), settings.recompute.image, settings.recompute.offload)
    recompute(towers.get_submodule("text_model"), settings.recompute.text, settings.recompute.offload)
    head = Head(log_scale, bias)
    head.requires_grad_(not settings.lock.scale)
    if settings.precomputed.side is not None:
        preprocess = dataclasses.replace(
            preprocess, precomputed=precomputed_tower(towers, preprocess, settings.precomputed, weights)
        )
        remove_tower(towers, settings.precomputed.side)
    model = DualEncoder(towers, head, preprocess, settings, base)
    if model.batch_norms and weights:
        logger.info(
            f"{len(model.batch_norms)} batch-norm layers keep their pretrained statistics, so that images are "
            "embedded "
            f"independently"
        )
    return model


def build_to_load(settings: ModelSettings, weights: bool = False) -> DualEncoder:
    """The whole model, to be filled from a checkpoint: weights are not read, except those of a precomputed tower, which
    checkpoints lack."""
    side = settings.precomputed.side
    model = build(settings.without_precomputed_tower, weights=weights or side is not None)
    if side is not None:
        model.unsaved = frozenset(f"towers.{name}" for name in locked_part(model.towers, side))
        model.tower = precomputed_tower(model.towers, model.preprocess, settings.precomputed).fingerprint
    return model
