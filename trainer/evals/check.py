"""Checks an evaluation before training starts: opens its data, labels, classes and templates.

check(recipe.eval, recipe.data)  # raises UserError; no model, no images decoded: one sample of each dataset is read
"""

from __future__ import annotations

import torch

from trainer.core.types import UserError
from trainer.data.settings import DataSettings
from trainer.data.transforms import Damaged
from trainer.evals.encode import Pictures, Seen, chosen
from trainer.evals.examples import Examples, open_examples
from trainer.evals.settings import EvalSettings, ZeroShotSettings
from trainer.evals.zeroshot import check_naming

TRIED = 100
"""After this many damaged samples the check gives up; the evaluation itself will count them."""


def datasets(settings: EvalSettings, data: DataSettings) -> list[str]:
    """Paths to retrieve on."""
    return settings.data or ([data.validation] if data.validation else [])


def data_of(zeroshot: ZeroShotSettings, paths: list[str]) -> str:
    """The path that ``zeroshot`` classifies."""
    if not (zeroshot.data or paths):
        raise UserError(f"eval.zeroshot {zeroshot.title!r} has no data, and eval.data is empty")
    return zeroshot.data or paths[0]


def asked_for(settings: EvalSettings, data: DataSettings) -> bool:
    """Whether there is any data to evaluate on."""
    return bool(datasets(settings, data)) or any(zeroshot.data for zeroshot in settings.zeroshot)


def check(settings: EvalSettings, data: DataSettings) -> None:
    """Raises the UserErrors that ``trainer.evals.evaluate`` would raise at its first image."""
    if not asked_for(settings, data):
        return
    opened: dict[str, Pictures] = {}

    def first_at(path: str, key: str) -> Pictures:
        if path not in opened:
            try:
                opened[path] = _first(open_examples(path, data), settings)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
        return opened[path]

    paths = datasets(settings, data)
    for path in paths:
        pictures = first_at(path, "eval.data" if settings.data else "data.validation")
        for seen in pictures.seen:
            if settings.by and seen.captions and settings.by not in seen.metadata:
                raise UserError(f"{path}: sample {seen.sample} has no {settings.by!r}, which eval.by asks for")
            if not seen.captions and not any(data_of(zeroshot, paths) == path for zeroshot in settings.zeroshot):
                check_naming(ZeroShotSettings(data=path), pictures)  # classes are all that it holds
    for zeroshot in settings.zeroshot:
        where = f"eval.zeroshot {zeroshot.title!r}"
        pictures = first_at(data_of(zeroshot, paths), where)
        try:
            check_naming(zeroshot, pictures)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('eval.zeroshot: ')}") from None


def _first(examples: Examples, settings: EvalSettings) -> Pictures:
    """The first image that would be evaluated, without features; none if all that were tried are damaged."""
    seen = []
    for sample in chosen(examples, settings)[:TRIED]:
        try:
            example = examples.read(sample)
        except Damaged:
            continue
        seen.append(Seen(sample, "", example.captions, example.metadata))
        break
    examples.close()
    return Pictures(examples, seen, torch.empty(0, 0))
