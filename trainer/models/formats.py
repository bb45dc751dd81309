"""A trained model in the formats of other libraries: `python -m trainer.export RUN OUT --format NAME`.

    transformers            AutoModel.from_pretrained(OUT), AutoProcessor.from_pretrained(OUT)
    open_clip               open_clip.create_model("local-dir:OUT"), open_clip.get_tokenizer("local-dir:OUT")
    sentence-transformers   SentenceTransformer(OUT).encode(captions or images)
    onnx                    onnxruntime.InferenceSession("OUT/image.onnx"), "OUT/text.onnx"

Every format holds the whole model; an adapter is merged.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.types import UserError
from trainer.models import open_clip
from trainer.models.dual_encoder import DualEncoder
from trainer.models.naflex import NAFLEX
from trainer.models.pooling import other_pooling
from trainer.models.preprocess import make_processor
from trainer.models.save import plain_weights, save_pretrained
from trainer.models.towers import quietly
from trainer.models.vision_text import PAIR

ONNX_FACTS = "ringlip.json"
"""Beside the graphs: the temperature, the bias and the sizes of the inputs."""


def save_open_clip(model: DualEncoder, folder: Path, state: dict[str, Tensor]) -> None:
    """A directory that open_clip loads by ``local-dir:FOLDER``. Raises UserError for a model that open_clip does not
    have."""
    weights = plain_weights(model, state)
    weights["logit_scale"], bias = state["head.logit_scale"].reshape(()), state.get("head.logit_bias")
    if bias is not None:
        weights["logit_bias"] = bias.reshape(())
    with quietly():
        tokenizer = make_processor(model.preprocess, model.towers.config).tokenizer
        open_clip.write(folder, model.towers.config, weights, model.preprocess, tokenizer)


def save_sentence_transformers(model: DualEncoder, folder: Path, state: dict[str, Tensor]) -> None:
    """A directory that sentence-transformers (5.4 and later) loads: captions and images in, embeddings of length 1
    out. Plain transformers loads it as well."""
    if model.family == NAFLEX or (pooling := other_pooling(model.towers.config)) is not None:
        why = "NaFlex reads the shape of each image" if model.family == NAFLEX else f"this pair pools by {pooling}"
        raise UserError(f"sentence-transformers has no module for this model ({why}): export without --format")
    save_pretrained(model, folder, state)
    kinds = ("Transformer", ""), ("Normalize", "1_Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(kinds)
    ]
    features = {
        side: {"method": f"get_{side}_features", "method_output_name": "pooler_output"} for side in ("text", "image")
    }
    padded = {"padding": "max_length", "truncation": True, "max_length": model.preprocess.num_tokens}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": features,
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": padded},
    }
    (folder / "1_Normalize").mkdir(exist_ok=True)
    _write_json(folder / "1_Normalize" / "config.json", {})
    _write_json(folder / "sentence_bert_config.json", transformer)
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    _write_json(folder / "modules.json", modules)


def save_onnx(model: DualEncoder, folder: Path, state: dict[str, Tensor]) -> None:
    """``image.onnx`` (pixels [b, 3, h, w] uint8, resized as in training) and ``text.onnx`` (tokens [b, n] int64, and
    for a pair token_mask [b, n] bool), each to embeddings [b, d] float32 of length 1; with the processor and
    ringlip.json."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'ringlip[onnx]'")
    if model.family == NAFLEX:
        raise UserError("--format onnx: a NaFlex model reads the shape of each image, which no graph here expresses")
    save_pretrained(model, folder, state)
    plain = DualEncoder.from_pretrained(folder).eval()
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    height, width = plain.preprocess.image_size
    batch = torch.export.Dim("batch")
    pixels = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    tokens, mask = plain.preprocess.tokenize(["a", "b"])
    texts = (tokens, mask) if plain.family == PAIR else (tokens,)
    names = ["tokens", "token_mask"][: len(texts)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, graph, inputs, called in (
            ("image.onnx", _Images(plain), (pixels,), ["pixels"]),
            ("text.onnx", _Texts(plain), texts, names),
        ):
            torch.onnx.export(
                graph,
                inputs,
                folder / file,
                input_names=called,
                output_names=["embeddings"],
                dynamic_shapes=({0: batch},) * len(inputs),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    scale, bias = (value.item() for value in plain.head())
    facts = {"format": "ringlip-onnx", "scale": scale, "bias": bias, "num_tokens": plain.preprocess.num_tokens}
    _write_json(folder / ONNX_FACTS, {**facts, "image_size": [height, width]})


class _Images(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.embed_images(pixels)


class _Texts(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.model.embed_texts(tokens, token_mask)


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


FORMATS: dict[str, Callable[[DualEncoder, Path, dict[str, Tensor]], None]] = {
    "transformers": save_pretrained,
    "open_clip": save_open_clip,
    "sentence-transformers": save_sentence_transformers,
    "onnx": save_onnx,
}
