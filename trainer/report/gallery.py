"""The part of the page with example images: queries with their best answers, right and wrong, in both directions."""

from __future__ import annotations

import math
from html import escape
from typing import Any

FIRST = 6
"""Cards shown before "show more"."""


def gallery_html(gallery: dict[str, Any]) -> str:
    """Nothing where there is no gallery."""
    if not gallery:
        return ""
    probability = gallery["bias"] != 0
    said = (
        "the model's probability that image and caption belong together"
        if probability
        else "the cosine of image and caption"
    )
    parts = [
        "<h2>Images and captions</h2><p>Held-out queries, drawn at random among those that are answered right and "
        f"those that are not, with their five best answers. Numbers are {said}; green marks what belongs together.</p>"
    ]
    for dataset in gallery["datasets"]:
        if len(gallery["datasets"]) > 1:
            parts.append(f"<h3>{escape(dataset['name'])}</h3>")
        for direction, title in (
            ("image_to_text", "From an image to its caption"),
            ("text_to_image", "From a caption to its image"),
        ):
            for right in (True, False):
                queries = [query for query in dataset[direction] if (query["place"] == 1) == right]
                cards = [_card(query, dataset["thumbnails"], gallery) for query in queries]
                if cards:
                    parts.append(
                        f"<h3>{title}: {'right' if right else 'wrong'}</h3>{_fold(cards, direction == 'text_to_image')}"
                    )
    return "".join(parts)


def _fold(cards: list[str], wide: bool) -> str:
    kind = "cards wide" if wide else "cards"
    shown = f'<div class="{kind}">{"".join(cards[:FIRST])}</div>'
    if len(cards) > FIRST:
        shown += (
            f"<details><summary>{len(cards) - FIRST} more</summary><div "
            f'class="{kind}">{"".join(cards[FIRST:])}</div></details>'
        )
    return shown


def _card(query: dict[str, Any], thumbnails: dict[str, str], gallery: dict[str, Any]) -> str:
    right = query["place"] == 1
    verdict = "<b>right</b>" if right else f"<b>wrong</b>: the right one is number {query['place']:,}"
    place = f'<p class="place {"right" if right else "wrong"}">{verdict}</p>'
    if "captions" in query:
        rows = [
            _row(answer["caption"], _score(answer["score"], gallery), answer["right"]) for answer in query["answers"]
        ]
        if not any(answer["right"] for answer in query["answers"]):
            rows.append(_row(query["captions"][0], "", True, missing=True))
        picture = f'<div class="picture">{_image(query["picture"], thumbnails)}{place}</div>'
        return f'<div class="card">{picture}<ol class="answers">{"".join(rows)}</ol></div>'
    cells = [
        _cell(answer["picture"], _score(answer["score"], gallery), answer["right"], thumbnails)
        for answer in query["answers"]
    ]
    if not any(answer["right"] for answer in query["answers"]):
        cells.append(_cell(query["picture"], "its own", True, thumbnails, missing=True))
    caption = f"<p>{escape(query['caption'])}</p>"
    return f'<div class="card column">{caption}<ul class="strip">{"".join(cells)}</ul>{place}</div>'


def _row(caption: str, score: str, own: bool, missing: bool = False) -> str:
    kind = "own missing" if missing else "own" if own else ""
    return f'<li class="{kind}"><span>{escape(caption)}</span><em>{score}</em></li>'


def _cell(picture: int, score: str, own: bool, thumbnails: dict[str, str], missing: bool = False) -> str:
    kind = "own missing" if missing else "own" if own else ""
    return f'<li class="{kind}">{_image(picture, thumbnails)}{score}</li>'


def _image(picture: int, thumbnails: dict[str, str]) -> str:
    source = thumbnails.get(str(picture), "")
    assert source.startswith("data:image/"), "a page that asks for nothing else holds its images itself"
    # PNG is what tiny images are kept in: they are shown as large squares instead of a blur.
    tiny = ' class="tiny"' if source.startswith("data:image/png") else ""
    return f'<img{tiny} src="{escape(source)}" alt="" loading="lazy">'


def _score(cosine: float, gallery: dict[str, Any]) -> str:
    if gallery["bias"] == 0:
        return f"{cosine:.2f}"
    logit = max(-500.0, min(500.0, gallery["scale"] * cosine + gallery["bias"]))
    share = 100 / (1 + math.exp(-logit))
    return f"{share:.0f}%" if share >= 9.5 else f"{share:.1f}%" if share >= 0.095 else "<0.1%".replace("<", "&lt;")
