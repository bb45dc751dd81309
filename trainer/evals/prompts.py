"""Prompt templates: the standard ensembles, files, and templates that use a sample's metadata.

    evals: {zeroshot: [{label: face, templates: ["{character}, {face}"]}]}      # written out
    evals: {zeroshot: [{label: breed, templates: [openai_imagenet]}]}           # by the name of a set

"{}" and "{c}" stand for the class name, "{FIELD}" for that field of the sample's metadata (the label's own field for
the class name).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.core.types import UserError

# The 80 templates found by OpenAI for ImageNet (arXiv 2103.00020, section 3.1.4;
# notebooks/Prompt_Engineering_for_ImageNet of openai/CLIP). All but eight come in pairs that differ in the article.
_PAIRS = (
    "bad photo of", "photo of {article} hard to see", "low resolution photo of", "rendering of", "bright photo of",
    "dark photo of", "drawing of", "cropped photo of", "close-up photo of", "black and white photo of", "painting of",
    "pixelated photo of", "sculpture of", "jpeg corrupted photo of", "blurry photo of", "good photo of", "photo of",
    "doodle of", "sketch of", "rendition of",
    "photo of {article} clean", "photo of {article} dirty", "photo of {article} cool", "photo of {article} nice",
    "photo of {article} weird", "photo of {article} large", "photo of {article} small",
)  # fmt: skip
_BARE_PAIRS = (
    "graffiti of",
    "tattoo of",
    "embroidered",
    "plastic",
    "origami",
    "toy",
    "cartoon",
    "art of",
    "plushie",
    "itap of",
)


def _openai_imagenet() -> tuple[str, ...]:
    found = []
    for article in ("a", "the"):
        for phrase in _PAIRS:
            named = phrase.replace("{article}", article) if "{article}" in phrase else f"{phrase} {article}"
            found.append(f"a {named} {{}}.")
        for phrase in _BARE_PAIRS:
            if phrase in ("graffiti of", "art of", "itap of"):
                found.append(f"{phrase} {article} {{}}.")
            elif phrase == "tattoo of":
                found.append(f"a {phrase} {article} {{}}.")
            else:
                found.append(f"{article} {phrase} {{}}.")
        found.append(f"{article} {{}} in a video game.")
    return (*found, "a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}.")


_KINDS_OF_PHOTO = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "openai_imagenet": _openai_imagenet(),
    # The seven that the same notebook's search kept.
    "openai_imagenet_7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    # CIFAR-10 and CIFAR-100, data/prompts.md of openai/CLIP.
    "openai_cifar": (
        *(f"a {kind}photo of {article} {{}}." for article in ("a", "the") for kind in _KINDS_OF_PHOTO),
        *(f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big")),
    ),
}


def read_templates(spec: Sequence[str]) -> list[str]:
    """Templates from what a recipe or a command line says: each item is a template (it has braces), a set's name or a
    file of lines."""
    found: list[str] = []
    for item in spec:
        if "{" in item:
            found.append(item)
        elif item in TEMPLATES:
            found.extend(TEMPLATES[item])
        elif Path(item).is_file():
            found.extend(read_lines(Path(item)))
        else:
            raise UserError(
                f"templates: {item!r} is neither a template (it has no {{}}), nor a file, nor one of the sets "
                f"{', '.join(TEMPLATES)}"
            )
    for template in found:
        _fields(template)
    if not found:
        raise UserError("templates: the list is empty; at least one, such as '{}'")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def context_fields(templates: Sequence[str], label: str) -> list[str]:
    """The metadata fields in the templates other than the class name; empty if all images share their prompts."""
    return sorted({field for template in templates for field in _fields(template)} - {"", "c", label})


def prompts(templates: Sequence[str], name: str, label: str, context: Mapping[str, object]) -> list[str]:
    """One prompt per template, for the class ``name`` and a sample with the metadata ``context``."""
    values = {**context, "c": name, label: name}
    return [string.Formatter().vformat(template, (name,), values) for template in templates]


def _fields(template: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(f"templates: {template!r} is not a template ({error})") from None
    odd = [field for field in fields if not (field == "" or field.isidentifier())]
    if odd or fields.count("") > 1:
        raise UserError(
            f"templates: {template!r}: a place is written {{}} (once) or {{FIELD}}, a field of the sample's metadata"
        )
    if not fields:
        raise UserError(f"templates: {template!r} has no place for the class name: write {{}} where it goes")
    return fields
