"""Example queries with their best answers, right and wrong, as plain data with thumbnails, for the report."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainer.data.transforms import decode
from trainer.evals.encode import Pictures
from trainer.evals.ranking import Standing
from trainer.evals.retrieval import best
from trainer.evals.run import Evaluation, Retrieved

ANSWERS = 5


def make_gallery(found: Evaluation, queries: int = 12, seed: int = 0, side: int = 128) -> dict[str, Any]:
    """For each dataset and direction ``queries`` that are right and as many that are wrong (fewer where there are
    fewer), drawn by ``seed``, each with its 5 best answers and their cosines; ``thumbnails`` maps the pictures' numbers
    to data URIs of at most ``side``.

        {"scale", "bias", "datasets": [{"name", "image_to_text": [query], "text_to_image": [query], "thumbnails":
        {number: uri}}]} query = {"picture" and "captions" | "caption" and "picture", "place", "answers": [{"caption" |
        "picture", "score", "right"}]}

    ``place`` is 1 + the number of wrong answers before the best right one.
    """
    datasets = []
    for prefix, one in found.retrieved.items():
        pictures = _pictures(one, queries, seed)
        captions = _captions(one, queries, seed)
        shown = {query["picture"] for query in pictures + captions} | {
            answer["picture"] for query in captions for answer in query["answers"]
        }
        seen = one.pictures.seen
        thumbnails = {str(number): thumbnail(one.pictures, seen[number].sample, side) for number in sorted(shown)}
        name = prefix.rstrip("/") or one.pictures.examples.path
        datasets.append({"name": name, "image_to_text": pictures, "text_to_image": captions, "thumbnails": thumbnails})
    return {"scale": found.scale, "bias": found.bias, "datasets": datasets}


def thumbnail(pictures: Pictures, sample: int, side: int) -> str:
    """A data URI: lossless PNG for a tiny image, else JPEG."""
    image = Image.fromarray(decode(pictures.examples.read(sample).image, pictures.max_pixels))
    small = max(image.size) <= 64
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 82}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


def _pictures(one: Retrieved, queries: int, seed: int) -> list[dict[str, Any]]:
    chosen = _choose(one.of_image, queries, seed)
    scores, answers = best(one.pictures.features[chosen], one.text, ANSWERS)
    found = []
    for number, row_scores, row in zip(chosen.tolist(), scores.tolist(), answers.tolist(), strict=True):
        answer = [
            {"caption": one.captions[text], "score": score, "right": int(one.owner[text]) == number}
            for score, text in zip(row_scores, row, strict=True)
        ]
        own = one.pictures.seen[number].captions
        found.append(
            {"picture": number, "captions": own, "place": int(one.of_image.better[number]) + 1, "answers": answer}
        )
    return found


def _captions(one: Retrieved, queries: int, seed: int) -> list[dict[str, Any]]:
    chosen = _choose(one.of_text, queries, seed + 1)
    scores, answers = best(one.text[chosen], one.pictures.features, ANSWERS)
    found = []
    for text, row_scores, row in zip(chosen.tolist(), scores.tolist(), answers.tolist(), strict=True):
        owner = int(one.owner[text])
        answer = [
            {"picture": number, "score": score, "right": number == owner}
            for score, number in zip(row_scores, row, strict=True)
        ]
        found.append(
            {
                "caption": one.captions[text],
                "picture": owner,
                "place": int(one.of_text.better[text]) + 1,
                "answers": answer,
            }
        )
    return found


def _choose(standing: Standing, queries: int, seed: int) -> Tensor:
    """Numbers of right queries, then of wrong ones; ties are left out."""
    order = torch.randperm(len(standing.better), generator=torch.Generator().manual_seed(seed)).to(
        standing.better.device
    )
    right = order[(standing.better[order] == 0) & (standing.level[order] == 0)]
    wrong = order[standing.better[order] > 0]
    return torch.cat([right[:queries], wrong[:queries]])
