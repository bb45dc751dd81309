"""Reads a picture's header without decoding it: format, size, orientation, and what in it needs changing."""

from __future__ import annotations

import io
import warnings
import zlib
from dataclasses import dataclass, field

from PIL import Image

from data_tools.samples.reject import Reject

_TEXT_START = b"\xef\xbb\xbf \t\r\n"
_MAGIC = (b"GIF8", b"II*\0", b"MM\0*")


@dataclass
class Header:
    """What is known of a picture before its pixels are. ``width`` and ``height`` are those of the upright picture."""

    format: str
    """jpg, png, webp or, for the rest, Pillow's name in lower case."""
    width: int
    height: int
    lossless: bool
    components: int = 3
    orientation: int = 1
    """EXIF orientation, 1 (upright) .. 8."""
    changes: list[str] = field(default_factory=list)
    """Why the bytes cannot be kept."""


def read_header(data: bytes) -> Header:
    """The header of a picture in memory. Raises Reject with the reason when it is none."""
    if data[:3] == b"\xff\xd8\xff":
        header = _jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        header = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _pillow(data, "webp")
    else:
        header = _pillow(data, _other(data))
    if header.orientation != 1:
        header.changes.append("exif_orientation")
        if header.orientation >= 5:
            header.width, header.height = header.height, header.width
    return header


def _other(data: bytes) -> str:
    if not data:
        raise Reject("empty_file")
    head = data[:1024].lstrip(_TEXT_START).lower()
    if head.startswith(b"<"):
        raise Reject("svg" if b"<svg" in head else "html")
    return ""


def _jpeg(data: bytes) -> Header:
    orientation, at = 1, 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise Reject("corrupt")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0x01, *range(0xD0, 0xD8)):
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + length])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > len(data):
                break
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            if data[at + 4] != 8 or not width or not height:
                raise Reject("pixel_format" if width and height else "corrupt")
            changes = ["cmyk"] if data[at + 9] == 4 else []
            return Header("jpg", width, height, False, data[at + 9], orientation, changes)
        elif marker in (0xD9, 0xDA):
            raise Reject("corrupt")
        at += 2 + length
    raise Reject("truncated")


def _orientation(tiff: bytes) -> int:
    """The orientation tag in the first directory of an EXIF block; 1 when there is none or it makes no sense."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1
    little = order == "little"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if little else "big")

    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(tiff) - 11), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _png(data: bytes) -> Header:
    """Walks all chunks and checks their checksums, which Pillow does not for pixel data."""
    at, changes, orientation, ended = 8, [], 1, False
    width = height = 0
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            break
        if zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != int.from_bytes(
            data[at + 8 + length : at + 12 + length], "big"
        ):
            raise Reject("corrupt")
        if kind == b"IHDR" and length == 13:
            width, height = (
                int.from_bytes(data[at + 8 : at + 12], "big"),
                int.from_bytes(data[at + 12 : at + 16], "big"),
            )
            depth, color = data[at + 16], data[at + 17]
            if depth == 16:
                changes.append("16_bit")
            if color in (4, 6):
                changes.append("alpha")
        elif kind == b"tRNS" and "alpha" not in changes:
            changes.append("alpha")
        elif kind == b"acTL":
            changes.append("first_frame")
        elif kind == b"eXIf":
            orientation = _orientation(data[at + 8 : at + 8 + length])
        elif kind == b"IEND":
            ended = True
            break
        at += 12 + length
    if not width or not height:
        raise Reject("corrupt" if ended else "truncated")
    if not ended:
        raise Reject("truncated")
    return Header("png", width, height, True, orientation=orientation, changes=changes)


def _pillow(data: bytes, known: str) -> Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that the strict decoding will decide on
            return _inspect(Image.open(io.BytesIO(data)), known)
    # Pillow's plugins raise almost anything on damaged headers.
    except Exception:
        raise Reject("corrupt" if known or data[:4] in _MAGIC else "unknown_format") from None


def _inspect(image: Image.Image, known: str) -> Header:
    name = known or (image.format or "").lower()
    changes = [] if known else [f"from_{name}"]
    if getattr(image, "n_frames", 1) > 1:
        changes.append("first_frame")
    if image.mode.startswith("I;16"):
        changes.append("16_bit")
    if image.has_transparency_data:
        changes.append("alpha")
    if image.mode == "CMYK":
        changes.append("cmyk")
    orientation = image.getexif().get(0x0112, 1)
    lossless = name not in ("webp", "avif", "jpeg2000")
    return Header(
        name, *image.size, lossless, orientation=orientation if orientation in range(1, 9) else 1, changes=changes
    )
