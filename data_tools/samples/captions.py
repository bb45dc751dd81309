"""Cleans captions: UTF-8, one line, no control characters, bounded length. Scripts, direction marks and emoji stay."""

from __future__ import annotations

import re
from typing import Any

from data_tools.samples.reject import Reject

# C0, C1 and DEL, lone surrogates, byte order marks, interlinear annotations and the two non-characters of the basic
# plane.
_UNWANTED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]+")


def clean(text: str, max_length: int) -> tuple[str, bool]:
    """(The cleaned caption of at most ``max_length`` characters, whether it was cut). Cuts between words if there is a
    space."""
    # Enough raw characters for any caption: cleaning a megabyte would cost time.
    text = " ".join(_UNWANTED.sub(" ", text[: 8 * max_length]).split())
    if len(text) <= max_length:
        return text, False
    head, space, _ = text[: max_length + 1].rpartition(" ")
    return (head.rstrip() if space and len(head) > max_length // 2 else text[:max_length].rstrip()), True


def clean_all(values: list[Any], max_length: int) -> tuple[list[str], bool]:
    """(The cleaned captions of one image without empty and repeated ones, whether any was cut). Raises Reject if none
    is left: ``caption_missing`` if all were null, else ``caption_empty``."""
    given = [value for value in values if value is not None]
    if not given:
        raise Reject("caption_missing")
    kept: dict[str, None] = {}
    any_cut = False
    for value in given:
        text, cut = clean(value if isinstance(value, str) else str(value), max_length)
        any_cut |= cut
        if text:
            kept[text] = None
    if not kept:
        raise Reject("caption_empty")
    return list(kept), any_cut
