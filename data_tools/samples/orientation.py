"""The one place that decides how an image is turned: from its EXIF, else from its XMP, for every format.

TIFFs are turned by Pillow while they are loaded, and are upright here.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_XMP = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
_SIZES = {1: 1, 3: 2, 4: 4}
"""Bytes of a TIFF field's value by its type: BYTE, SHORT, LONG."""


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """1 (upright) .. 8 from an EXIF block (with or without its "Exif" prefix) and an XMP packet; 1 where neither says,
    or where the value makes no sense."""
    value = _from_exif(exif.removeprefix(b"Exif\0\0"))
    if value is None:
        found = _XMP.search(xmp)
        value = int(found[1]) if found else 1
    return value if 1 <= value <= 8 else 1


def _from_exif(tiff: bytes) -> int | None:
    """The orientation tag in the first directory; None where there is none."""
    little = {b"II": True, b"MM": False}.get(tiff[:2])
    if little is None:
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if little else "big")

    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(tiff) - 11), 12):
        if number(entry, 2) == 0x0112:
            return number(entry + 8, _SIZES.get(number(entry + 2, 2), 2))
    return None


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes an orientation of 1 .. 8. [height, width, 3] -> the same, or [width, height, 3]."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
