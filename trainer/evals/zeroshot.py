"""Zero-shot classification: the class whose prompts lie nearest to the image (CLIP, arXiv 2103.00020, section 3.1).

A class is the normalised mean of the embeddings of its prompts (an ensemble of templates). If templates use an image's
metadata, each image has its own class prompts: "{character}, {face}" asks for the face of a known character.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.core.types import UserError
from trainer.evals.encode import Encoder, Pictures, Seen
from trainer.evals.examples import CLASSES, TEMPLATES
from trainer.evals.prompts import context_fields, prompts, read_lines, read_templates
from trainer.evals.ranking import Standing
from trainer.evals.settings import ZeroShotSettings

DEPTHS = (1, 5)
CHUNK = 4096
"""Prompts to embed before averaging, so that memory does not grow with the number of templates."""


@dataclass(frozen=True)
class Named:
    """The result of one classification."""

    metrics: dict[str, float]
    """TITLE_top1, TITLE_top5 and, if an image may have several right names, TITLE_strict_top1 (only its label
    counts)."""
    ceilings: dict[str, float]
    """For strict_top1: the score of a perfect model that guesses among the right names of an image."""
    errors: dict[str, float]
    """Standard errors of the shares of images."""
    by_class: dict[str, float]
    """Top-1 share of each class."""
    names: list[str]
    templates: list[str]


def name_pictures(settings: ZeroShotSettings, pictures: Pictures, encoder: Encoder) -> Named:
    """Classifies ``pictures``; all ranks call it and get the same. Raises UserError for labels, classes or fields that
    do not fit."""
    names, filed = _labels(settings, pictures)
    templates = _templates(settings, pictures)
    fields = context_fields(templates, settings.label)
    classes = (
        _own_classes(pictures, names, templates, settings, fields, encoder)
        if fields
        else _classes(names, templates, settings, encoder)
    )
    strict = torch.nn.functional.one_hot(torch.tensor(filed), len(names)).bool()
    right = _accepted(settings, pictures, names, strict) if settings.accept else strict
    device = pictures.features.device
    standing = classify(pictures.features, classes, right.to(device))
    title = settings.title
    metrics = {f"{title}_{key}": value for key, value in accuracies(standing).items()}
    by_class = per_class(standing, torch.tensor(filed, device=device), names)
    errors = {f"{title}_top{k}": standing.standard_error(k) for k in DEPTHS}
    metrics[f"{title}_mean_per_class"] = sum(by_class.values()) / len(by_class)
    ceilings = {}
    if settings.accept:
        by_file = classify(pictures.features, classes, strict.to(device))
        metrics[f"{title}_strict_top1"], errors[f"{title}_strict_top1"] = by_file.recall(1), by_file.standard_error(1)
        ceilings[f"{title}_strict_top1"] = (1.0 / right.sum(1).double()).mean().item()
    return Named(metrics, ceilings, errors, by_class, names, templates)


def check_naming(settings: ZeroShotSettings, pictures: Pictures) -> None:
    """Raises the errors of ``name_pictures`` for its files and for ``pictures``, which may be a few, without
    features."""
    if pictures.seen:
        _labels(settings, pictures)
    fields = context_fields(_templates(settings, pictures), settings.label)
    for field in [*fields, *([settings.accept] if settings.accept else [])]:
        for seen in pictures.seen:
            _field(field, seen, pictures)


def _labels(settings: ZeroShotSettings, pictures: Pictures) -> tuple[list[str], list[int]]:
    """(class names, the class of each image)."""
    labels = [_field(settings.label, seen, pictures) for seen in pictures.seen]
    file = settings.classes or str(pictures.examples.beside(CLASSES) or "")
    if file:
        names = read_lines(Path(file))
    else:
        if all(isinstance(label, int) for label in labels):
            raise UserError(
                f"eval.zeroshot: {settings.label!r} in {pictures.examples.path} is a number: give its names as "
                f"classes=FILE"
            )
        names = sorted({str(label) for label in labels})
    numbers = {name: number for number, name in enumerate(names)}
    filed = []
    for label in labels:
        number = label if isinstance(label, int) else numbers.get(str(label), -1)
        if not 0 <= number < len(names):
            raise UserError(
                f"{file}: {settings.label} {label!r} of {pictures.examples.path} is not among its {len(names)} classes"
            )
        filed.append(number)
    return names, filed


def _accepted(settings: ZeroShotSettings, pictures: Pictures, names: list[str], strict: Tensor) -> Tensor:
    numbers = {name: number for number, name in enumerate(names)}
    right = strict.clone()
    for row, seen in enumerate(pictures.seen):
        value = _field(settings.accept, seen, pictures)
        for name in value if isinstance(value, list) else str(value).split("|"):
            if name in numbers:
                right[row, numbers[name]] = True
    return right


def _templates(settings: ZeroShotSettings, pictures: Pictures) -> list[str]:
    own = pictures.examples.beside(TEMPLATES)
    return read_templates(settings.templates or ([str(own)] if own else ["{}"]))


def _classes(names: list[str], templates: list[str], settings: ZeroShotSettings, encoder: Encoder) -> Tensor:
    """[c, d]: prompts shared by all images."""
    at_once = max(1, CHUNK // len(templates))
    parts = []
    for start in range(0, len(names), at_once):
        chunk = names[start : start + at_once]
        texts = [text for name in chunk for text in prompts(templates, name, settings.label, {})]
        parts.append(ensemble(encoder.texts(texts).unflatten(0, (len(chunk), len(templates)))))
    return torch.cat(parts)


def _own_classes(
    pictures: Pictures,
    names: list[str],
    templates: list[str],
    settings: ZeroShotSettings,
    fields: list[str],
    encoder: Encoder,
) -> Tensor:
    """[n, c, d]: prompts with each image's metadata; images with equal metadata share them."""
    contexts: dict[tuple[str, ...], int] = {}
    context_of = []
    for seen in pictures.seen:
        values = tuple(str(_field(field, seen, pictures)) for field in fields)
        context_of.append(contexts.setdefault(values, len(contexts)))
    at_once = max(1, CHUNK // (len(templates) * len(names)))
    known = list(contexts)
    parts = []
    for start in range(0, len(known), at_once):
        chunk = [dict(zip(fields, values, strict=True)) for values in known[start : start + at_once]]
        texts = [
            text for context in chunk for name in names for text in prompts(templates, name, settings.label, context)
        ]
        parts.append(ensemble(encoder.texts(texts).unflatten(0, (len(chunk), len(names), len(templates)))))
    return torch.cat(parts)[torch.tensor(context_of, device=pictures.features.device)]


def _field(field: str, seen: Seen, pictures: Pictures) -> Any:
    if field not in seen.metadata:
        known = ", ".join(sorted(seen.metadata)) or "none"
        raise UserError(
            f"eval.zeroshot: {pictures.examples.path}: sample {seen.sample} has no {field!r} in its metadata (it "
            f"has: {known})"
        )
    return seen.metadata[field]


def ensemble(prompts: Tensor) -> Tensor:
    """[..., templates, d] L2-normalised -> [..., d]: the normalised mean."""
    return normalize(prompts.float().mean(-2), dim=-1)


def classify(image: Tensor, classes: Tensor, right: Tensor, *, rows: int = 1024) -> Standing:
    """The rank of the right class of each image.

    ``image`` [n, d]; ``classes`` [c, d], or [n, c, d] if each image has its own; ``right`` [n, c] bool, at least one
    per image (if several, the best-ranked counts).
    """
    assert right.any(1).all(), "an image without a right class"
    parts = []
    for start in range(0, image.shape[0], rows):
        part = slice(start, min(start + rows, image.shape[0]))
        shared = classes.double() if classes.dim() == 2 else classes[part].double()
        scores = torch.einsum("nd,cd->nc" if classes.dim() == 2 else "nd,ncd->nc", image[part].double(), shared).float()
        true = right[part]
        own = scores.nan_to_num(nan=-torch.inf).masked_fill(~true, -torch.inf).amax(1, keepdim=True)
        wrong = scores.nan_to_num(nan=torch.inf)
        level = (wrong == own) & ~true
        best = (scores.nan_to_num(nan=-torch.inf) == own) & true
        parts.append(Standing(((wrong > own) & ~true).sum(1), level.sum(1), best.sum(1)))
    return Standing(*(torch.cat(field) for field in zip(*parts, strict=True)))


def accuracies(standing: Standing) -> dict[str, float]:
    """Top-1 and top-5 share, each in [0, 1]."""
    return {f"top{k}": standing.recall(k) for k in DEPTHS}


def per_class(standing: Standing, label: Tensor, names: list[str]) -> dict[str, float]:
    """Top-1 accuracy on the images of each class that has any; ``label`` [n] int64 is each image's class."""
    hits = standing.hits(1)
    wins = torch.zeros(len(names), dtype=torch.float64, device=hits.device).index_add_(0, label, hits)
    seen = torch.bincount(label, minlength=len(names))
    return {name: (wins[i] / seen[i]).item() for i, name in enumerate(names) if seen[i] > 0}
