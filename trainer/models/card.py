"""The model card: what the directory is, how to use it with plain transformers (and PEFT), and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.models.param_groups import Tower
from trainer.models.pooling import other_pooling, pooling_of, special_tokens

SIDES: tuple[Tower, ...] = ("image", "text")
TITLES = {"clip": "CLIP", "siglip": "SigLIP", "siglip2": "SigLIP 2", "vision-text-dual-encoder": "Dual-encoder"}
FRONT = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [{tags}]
{base}---

# {title}
"""

WHOLE = """
```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{where}").eval()
processor = AutoProcessor.from_pretrained("{where}")
"""

ADAPTER = """
```python
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "{where}").eval()
processor = AutoProcessor.from_pretrained("{where}")
"""

USE = """captions = ["a photo of a cat", "a photo of a dog"]
inputs = processor(
    text=captions, images=Image.open("picture.png").convert("RGB"),{images}
    padding="max_length", max_length={num_tokens}, truncation=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits_per_image
print(logits.{activation})
```

Captions are always padded to {num_tokens} tokens, as in training.
"""

PIPELINE_TOKENS = 64
"""What transformers' zero-shot pipeline pads the captions of any SigLIP to, whatever its tokenizer says."""
PIPELINE = """
transformers' zero-shot pipeline pads captions to 64 tokens, whatever the model reads; tell it:

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{where}")
classify._preprocess_params["tokenizer_kwargs"] = {{"max_length": {num_tokens}}}
found = classify("picture.png", candidate_labels=["a cat", "a dog"])
```
"""

OTHERS = {
    "open_clip": """
```python
import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{where}")
tokenizer = open_clip.get_tokenizer("local-dir:{where}")
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("picture.png").convert("RGB"))[None], normalize=True)
    text = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
print(image @ text.T)
```
""",
    "sentence-transformers": """
```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{where}")
image = model.encode([Image.open("picture.png").convert("RGB")])
text = model.encode(["a photo of a cat", "a photo of a dog"])
print(model.similarity(image, text))
```
""",
    "onnx": """
```python
import json

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoTokenizer

facts = json.load(open("{where}/ringlip.json"))
image_tower, text_tower = (onnxruntime.InferenceSession(f"{where}/{{name}}.onnx") for name in ("image", "text"))
height, width = facts["image_size"]
{resize}
tokens = AutoTokenizer.from_pretrained("{where}")(
    ["a photo of a cat", "a photo of a dog"], padding="max_length", truncation=True, max_length=facts["num_tokens"],
    return_tensors="np", return_attention_mask=True,
)
inputs = {{"tokens": tokens["input_ids"].astype(np.int64), "token_mask": tokens["attention_mask"].astype(bool)}}
names = {{each.name for each in text_tower.get_inputs()}}
pixels = np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)[None]
[image] = image_tower.run(None, {{"pixels": pixels}})
[text] = text_tower.run(None, {{name: value for name, value in inputs.items() if name in names}})
print(facts["scale"] * image @ text.T + facts["bias"])
```

Pixels are RGB, uint8, resized to {height} x {width} as above; the graph normalises them. Embeddings have length 1.
""",
}
"""How the other formats of models/formats.py are used."""
RESIZES = {
    "crop": """from PIL import ImageOps
picture = ImageOps.fit(Image.open("picture.png").convert("RGB"), (width, height), Image.Resampling.{resample})""",
    "squash": """picture = Image.open("picture.png").convert("RGB")
picture = picture.resize((width, height), Image.Resampling.{resample})""",
}

POOLED = """captions = ["a photo of a cat", "a photo of a dog"]
inputs = processor(
    text=captions, images=Image.open("picture.png").convert("RGB"),
    padding="max_length", max_length={num_tokens}, truncation=True, return_tensors="pt",
)
mask = inputs["attention_mask"]
with torch.no_grad():
    image = model.vision_model(pixel_values=inputs["pixel_values"])
    text = model.text_model(input_ids=inputs["input_ids"], attention_mask=mask)
    image = model.visual_projection({image})
    text = model.text_projection({text})
    image, text = torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)
    logits = model.logit_scale.exp() * image @ text.T
print(logits.{activation})
```

transformers' `VisionTextDualEncoderModel` reads the `pooler_output` of both towers. This model pools otherwise
(image: {image_pooling}, text: {text_pooling}), so `model(**inputs)` and `get_*_features` fail or give other embeddings:
use the lines above. Captions are always padded to {num_tokens} tokens, as in training.
"""
POOL_LINES = {
    "pooler": "{side}.pooler_output",
    "cls": "{side}.last_hidden_state[:, 0]",
    "last": "text.last_hidden_state[torch.arange(len(mask)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]",
}
"""What models/pooling.py does, in plain torch."""
MEANS = {
    "image": "image.last_hidden_state[:, {special}:].mean(1)",
    "maps": "image.last_hidden_state.mean((2, 3))",
    "text": "(text.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)",
}


def whole_card(model: Any, where: str, notes: Sequence[str], measured: str, format_name: str = "transformers") -> str:
    """README.md of an exported DualEncoder; ``notes``: facts, one a line; ``format_name``: see models/formats.py."""
    return _card(format_name, model, where, notes, measured, WHOLE)


def adapter_card(model: Any, where: str, notes: Sequence[str], measured: str) -> str:
    """README.md of a DualEncoder's adapter."""
    return _card("peft", model, where, notes, measured, ADAPTER)


def _card(library: str, model: Any, where: str, notes: Sequence[str], measured: str, load: str) -> str:
    family, base, num_tokens, images = model.family, model.settings.path, model.preprocess.num_tokens, ""
    if family == "siglip2":  # its processor does not remember them
        patch = model.towers.config.vision_config.patch_size
        images = f" patch_size={patch}, max_num_patches={model.preprocess.image_size[1] // patch - 1},"
    kind = f"{TITLES.get(family, family)} {'adapter' if library == 'peft' else 'model'}"
    front = FRONT.format(
        library=library,
        tags=f"{family}, ringlip" + (", lora" if library == "peft" else ""),
        base=f"base_model: {base}\n" if base else "",
        title=f"{kind} trained with RingLIP",
    )
    activation = "sigmoid()" if family.startswith("siglip") else "softmax(dim=1)"
    use = (load + USE).format(where=where, base=base, num_tokens=num_tokens, activation=activation, images=images)
    if library == "transformers" and family.startswith("siglip") and num_tokens != PIPELINE_TOKENS:
        use += PIPELINE.format(where=where, num_tokens=num_tokens)
    if other_pooling(model.towers.config) is not None:
        poolings = {f"{side}_pooling": pooling_of(model.towers.config, side) for side in SIDES}
        lines = {side: _pool_line(model.towers.config, side) for side in SIDES}
        use = (load + POOLED).format(
            where=where, base=base, num_tokens=num_tokens, activation=activation, **lines, **poolings
        )
    if library in OTHERS:
        height, width = model.preprocess.image_size
        resize = RESIZES.get(model.preprocess.resize, "").format(resample=model.preprocess.resample.upper())
        use = OTHERS[library].format(where=where, height=height, width=width, resize=resize)
    facts = "".join(f"- {note}\n" for note in notes)
    return f"{front}\n{facts}{use}{measured}"


def _pool_line(config: Any, side: Tower) -> str:
    pooling, vision = pooling_of(config, side), config.vision_config
    if pooling != "mean":
        return POOL_LINES[pooling].format(side=side)
    maps = side == "image" and getattr(vision, "patch_size", None) is None
    return MEANS["maps" if maps else side].format(special=special_tokens(vision))


def measured_table(evaluation: Mapping[str, Any]) -> str:
    """The section with the numbers of an ``evaluation.json``, in percent, with their standard errors and the command
    that measures them."""
    metrics, errors = evaluation["metrics"], evaluation.get("standard_errors") or {}
    ceilings, base = evaluation.get("ceilings") or {}, evaluation.get("base_metrics") or {}
    columns = (
        ["metric", "%", "± (standard error)"] + (["perfect model"] if ceilings else []) + (["base"] if base else [])
    )
    rows = []
    for name, value in metrics.items():
        row = [name, _percent(value), _percent(errors.get(name))]
        row += [_percent(ceilings.get(name))] if ceilings else []
        row += [_percent(base.get(name))] if base else []
        rows.append(row)
    table = "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])
    sizes = "; ".join(
        f"{path}: {size['pictures']:,} images, {size['captions']:,} captions"
        for path, size in evaluation["datasets"].items()
    )
    return f"\n## Measured\n\n{table}\n\nOn {sizes}. `{evaluation['command']}`\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
