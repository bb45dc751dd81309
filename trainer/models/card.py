"""The model card: what the directory is, how to use it with plain transformers (and PEFT), and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def whole_card(model: Any, where: str, notes: Sequence[str], measured: str) -> str:
    """README.md of an exported DualEncoder; ``notes``: facts, one a line."""
    return _card("transformers", model, where, notes, measured, WHOLE)


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
    lines = "".join(f"- {note}\n" for note in notes)
    return f"{front}\n{lines}{use}{measured}"


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
        f"{path}: {size['pictures']:,} pictures, {size['captions']:,} captions"
        for path, size in evaluation["datasets"].items()
    )
    return f"\n## Measured\n\n{table}\n\nOn {sizes}. `{evaluation['command']}`\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
