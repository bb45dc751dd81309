"""Runs the evaluations that a recipe's ``eval:`` section asks for.

    metrics = run(engine, settings, model.preprocess, rank, world, data=recipe.data)
    # {"image_to_text_r1": 0.78, "face_top1": ...}

All ranks call it and get the same numbers; each embeds its share. Every rank calls the model equally often, so it works
at any ZeRO stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.core.types import Preprocess, UserError
from trainer.data.settings import DataSettings
from trainer.evals.check import asked_for, data_of, datasets
from trainer.evals.encode import Encoder, Pictures, Wrapped
from trainer.evals.examples import open_examples
from trainer.evals.ranking import Standing
from trainer.evals.retrieval import DEPTHS, recalls, standings
from trainer.evals.settings import EvalSettings, ZeroShotSettings
from trainer.evals.upper_bound import retrieval_ceiling
from trainer.evals.zeroshot import Named, name_pictures

BRIEF = 6
"""Number of metrics on one terminal line."""


@dataclass(frozen=True)
class Retrieved:
    """Retrieval results on one dataset, with the features that a gallery needs."""

    pictures: Pictures
    text: Tensor
    """[m, d] features of the captions."""
    captions: list[str]
    owner: Tensor
    """[m] the image of each caption."""
    of_image: Standing
    of_text: Standing

    @property
    def metrics(self) -> dict[str, float]:
        """Recall at 1, 5 and 10 in both directions."""
        return recalls(self.of_image, self.of_text)

    @property
    def errors(self) -> dict[str, float]:
        """The standard error of each metric."""
        both = {"image_to_text": self.of_image, "text_to_image": self.of_text}
        return {f"{name}_r{k}": standing.standard_error(k) for name, standing in both.items() for k in DEPTHS}

    @property
    def ceilings(self) -> dict[str, float]:
        """Recall at 1 of a perfect model, given that some images or captions are identical."""
        looks = [seen.look for seen in self.pictures.seen]
        found = retrieval_ceiling(looks, self.captions, self.owner.tolist())
        return {name.removesuffix("_ceiling"): value for name, value in found.items()}


@dataclass
class Evaluation:
    """All results. A metric's flat name is ``prefix`` + metric; the prefix is empty for a single dataset."""

    retrieved: dict[str, Retrieved] = field(default_factory=dict)
    named: dict[str, Named] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """By path: number of samples, of images used, of captions, and of damaged images left out."""
    means: dict[str, list[str]] = field(default_factory=dict)
    """Prefix of a mean -> the prefixes of ``retrieved`` that it is taken over."""
    scale: float = 1.0
    bias: float = 0.0
    """The model's temperature and bias."""

    @property
    def metrics(self) -> dict[str, float]:
        """Flat names, each value in [0, 1]."""
        found = {prefix + name: value for prefix, one in self.retrieved.items() for name, value in one.metrics.items()}
        for mean, prefixes in self.means.items():
            names = self.retrieved[prefixes[0]].metrics
            found |= {mean + name: sum(found[prefix + name] for prefix in prefixes) / len(prefixes) for name in names}
        return found | {name: value for one in self.named.values() for name, value in one.metrics.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of the metrics."""
        found = {prefix + name: value for prefix, one in self.retrieved.items() for name, value in one.errors.items()}
        return found | {name: value for one in self.named.values() for name, value in one.errors.items()}

    @property
    def ceilings(self) -> dict[str, float]:
        """The highest possible value of each metric for which it is known."""
        found = {prefix + name: value for prefix, one in self.retrieved.items() for name, value in one.ceilings.items()}
        return found | {name: value for one in self.named.values() for name, value in one.ceilings.items()}


def evaluate(
    model: nn.Module | Wrapped,
    settings: EvalSettings,
    preprocess: Preprocess,
    rank: int,
    world: int,
    data: DataSettings | None = None,
) -> Evaluation:
    """Runs all evaluations in ``settings``. ``data`` says how shards are read; its validation set is used if
    ``settings.data`` is empty. Raises UserError if there is nothing to evaluate, or the data does not fit.
    """
    data = data or DataSettings()
    paths = datasets(settings, data)
    if not asked_for(settings, data):
        raise UserError("eval.data is empty, and so is data.validation: name shards to evaluate on")
    encoder = Encoder(model, settings, preprocess, rank, world, data.max_pixels)
    embedded: dict[str, Pictures] = {}
    found = Evaluation()

    def pictures_at(path: str) -> Pictures:
        if path not in embedded:
            embedded[path] = encoder.pictures(open_examples(path, data))
            pictures = embedded[path]
            counts = {
                "samples": pictures.examples.size,
                "pictures": len(pictures.seen),
                "captions": sum(len(seen.captions) for seen in pictures.seen),
            }
            found.sizes[path] = counts | {"damaged": sum(pictures.damaged.values())}
        return embedded[path]

    for path, prefix in zip(paths, prefixes(paths), strict=True):
        pictures = pictures_at(path)
        if any(seen.captions for seen in pictures.seen):
            whole = found.retrieved[prefix] = _retrieve(pictures, encoder)
            if settings.by:
                parts = {f"{prefix}{value}/": part for value, part in _by_value(whole, settings.by, encoder).items()}
                found.retrieved |= parts
                found.means[f"{prefix}mean per {settings.by}/"] = list(parts)
        elif not any((zeroshot.data or paths[0]) == path for zeroshot in settings.zeroshot):
            # A folder of CLIP_benchmark that holds classes and no captions says all that is needed.
            named = ZeroShotSettings(name=(prefix or "zeroshot/").rstrip("/"), data=path)
            found.named[named.title] = name_pictures(named, pictures, encoder)
    for zeroshot in settings.zeroshot:
        found.named[zeroshot.title] = name_pictures(zeroshot, pictures_at(data_of(zeroshot, paths)), encoder)
    found.scale, found.bias = encoder.scale, encoder.bias
    return found


def run(
    model: nn.Module | Wrapped,
    settings: EvalSettings,
    preprocess: Preprocess,
    rank: int,
    world: int,
    data: DataSettings | None = None,
) -> dict[str, float]:
    """The metrics of ``evaluate``, as training logs them."""
    return evaluate(model, settings, preprocess, rank, world, data).metrics


def brief(metrics: dict[str, float]) -> str:
    """The first recall and accuracy values at 1, as one terminal line."""
    main = [f"{name} {100 * value:.1f}%" for name, value in metrics.items() if name.endswith(("_r1", "_top1"))]
    more = f" and {len(main) - BRIEF} more in log.jsonl" if len(main) > BRIEF else ""
    return " · ".join(main[:BRIEF]) + more


def _retrieve(pictures: Pictures, encoder: Encoder) -> Retrieved:
    captions = [caption for seen in pictures.seen for caption in seen.captions]
    owners = [number for number, seen in enumerate(pictures.seen) for _ in seen.captions]
    bare = next((seen for seen in pictures.seen if not seen.captions), None)
    if bare is not None:
        raise UserError(
            f"{pictures.examples.path}: sample {bare.sample} has no caption: retrieval needs one for every image"
        )
    owner = torch.tensor(owners, device=pictures.features.device)
    text = encoder.texts(captions)
    both = standings(pictures.features, text, owner, rank=encoder.rank, world=encoder.world)
    return Retrieved(pictures, text, captions, owner, *both)


def _by_value(whole: Retrieved, name: str, encoder: Encoder) -> dict[str, Retrieved]:
    """Retrieval within each value of the metadata field ``name``: among its images and their captions."""
    rows_of: dict[str, list[int]] = {}
    for row, seen in enumerate(whole.pictures.seen):
        if name not in seen.metadata:
            raise UserError(
                f"{whole.pictures.examples.path}: sample {seen.sample} has no {name!r}, which eval.by asks for"
            )
        rows_of.setdefault(str(seen.metadata[name]), []).append(row)
    found = {}
    for value, rows in sorted(rows_of.items()):
        place = {row: number for number, row in enumerate(rows)}
        kept = [number for number, row in enumerate(whole.owner.tolist()) if row in place]
        index = torch.tensor(rows, device=whole.text.device), torch.tensor(kept, device=whole.text.device)
        pictures = replace(
            whole.pictures, seen=[whole.pictures.seen[row] for row in rows], features=whole.pictures.features[index[0]]
        )
        text, owner = (
            whole.text[index[1]],
            torch.tensor([place[int(whole.owner[number])] for number in kept], device=whole.text.device),
        )
        both = standings(pictures.features, text, owner, rank=encoder.rank, world=encoder.world)
        found[value] = Retrieved(pictures, text, [whole.captions[number] for number in kept], owner, *both)
    return found


def prefixes(paths: list[str]) -> list[str]:
    """Empty for one dataset; otherwise the folder's name and a slash, or the whole path if two folders have one
    name."""
    if len(paths) == 1:
        return [""]
    names = [Path(path.rstrip("/")).name for path in paths]
    return [f"{name if names.count(name) == 1 else path}/" for name, path in zip(names, paths, strict=True)]
