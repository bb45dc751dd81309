"""Checks an image strictly and changes it only where a training loader would otherwise see something else.

    prepared = prepare(data, ImageOptions(resize=224))      # .data .extension .width .height .changed; raises Reject

Kept byte for byte: JPEG, PNG and WebP that decode without a warning to upright 8-bit RGB, grey or palette pixels.
Everything else that can be decoded is re-encoded, and ``changed`` says why. A JPEG whose only fault lies outside
of its pixels (jpeg_faults.py) is kept without the fault, and ``changed`` names it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_tools.samples.decoding import check_pixels, decode_here, foreign_profile
from data_tools.samples.image_header import LIMITS, Header, Limits, cheap_header, in_sandbox, read_here
from data_tools.samples.reject import Reject

_LARGE = 3 * 25_000_000
"""Bytes of pixels above which PNGs are compressed lightly."""


@dataclass(frozen=True)
class ImageOptions:
    """What is done to every image; part of the plan hash."""

    resize: int | None = None
    """Target in pixels; None keeps the bytes of sound images."""
    resize_mode: Literal["shorter", "longer", "crop"] = "shorter"
    """Which side becomes ``resize``; ``crop`` makes the shorter side so and cuts the centre square. Never enlarges."""
    filter: Literal["hamming", "bicubic", "lanczos"] = "hamming"
    """Pillow's antialiased filters: hamming takes three fifths of the time of bicubic, which most image processors
    use."""
    encode: Literal["auto", "jpg", "png", "webp"] = "auto"
    """Format of re-encoded images; auto: PNG for what was lossless, JPEG for the rest."""
    quality: int = 95
    """JPEG and WebP quality of re-encoded images."""
    min_side: int = 8
    max_aspect: float = 20.0
    max_pixels: int = LIMITS.max_pixels
    max_bytes: int = 256 << 20
    formats: tuple[str, ...] = ()
    """Rare formats to read as well."""
    icc: Literal["ignore", "srgb"] = "ignore"
    """srgb converts images with another colour profile; ignore takes their values as they are, which is what image
    processors of pretrained models do."""
    max_memory: int = LIMITS.max_memory
    max_seconds: float = LIMITS.max_seconds

    @property
    def limits(self) -> Limits:
        """What decoding one image may cost."""
        return Limits(self.max_pixels, self.formats, self.max_memory, self.max_seconds)


class Prepared(NamedTuple):
    """An image as it is stored."""

    data: bytes
    extension: str
    width: int
    height: int
    changed: list[str]


def prepare(data: bytes, options: ImageOptions) -> Prepared:
    """The image as it will be stored. Raises Reject with the reason when it cannot be used."""
    header = cheap_header(data)
    if header is None:
        prepared: Prepared = in_sandbox("images:prepare_here", (data, options), options.limits)
        return prepared
    return prepare_here(data, options, header)


def prepare_here(data: bytes, options: ImageOptions, header: Header | None = None) -> Prepared:
    """``prepare`` in this process."""
    header = header or read_here(data, options.formats)
    _check_size(header, options)
    changed = list(header.changes)
    shrink = options.resize is not None and _target(header.width, header.height, options) != (
        header.width,
        header.height,
    )
    profile = foreign_profile(data, header) if options.icc == "srgb" else None
    if not changed and not shrink and profile is None:
        sound, notes = check_pixels(data, header)
        return Prepared(sound, header.format, header.width, header.height, notes)
    least = 2 * options.resize if shrink and options.resize else 0
    pixels, notes = decode_here(data, header, (least, least), profile)
    changed += notes
    if shrink:
        changed.append("resized")
        pixels = _resize(pixels, options)
    extension = options.encode if options.encode != "auto" else "png" if header.lossless else "jpg"
    height, width = pixels.shape[:2]
    return Prepared(encode(pixels, extension, options.quality), extension, width, height, changed)


def _check_size(header: Header, options: ImageOptions) -> None:
    width, height = header.width, header.height
    if width * height > options.max_pixels or max(width, height) > 65535:
        raise Reject("too_many_pixels")
    if min(width, height) < options.min_side:
        raise Reject("too_small")
    if max(width, height) > options.max_aspect * min(width, height):
        raise Reject("too_elongated")


def _target(width: int, height: int, options: ImageOptions) -> tuple[int, int]:
    assert options.resize
    side = max(width, height) if options.resize_mode == "longer" else min(width, height)
    scale = min(1.0, options.resize / side)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    if options.resize_mode == "crop":
        return min(width, options.resize), min(height, options.resize)
    return width, height


def _resize(pixels: NDArray[np.uint8], options: ImageOptions) -> NDArray[np.uint8]:
    assert options.resize
    height, width = pixels.shape[:2]
    target = _target(width, height, options)
    box: tuple[float, float, float, float] = (0, 0, width, height)
    if options.resize_mode == "crop":
        scale = max(target[0] / width, target[1] / height)
        cut_width, cut_height = min(width, target[0] / scale), min(height, target[1] / scale)
        left, top = (width - cut_width) / 2, (height - cut_height) / 2
        box = (left, top, left + cut_width, top + cut_height)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize(target, Image.Resampling[options.filter.upper()], box=box))


def encode(pixels: NDArray[np.uint8], extension: str, quality: int) -> bytes:
    """RGB pixels [height, width, 3] as a file: JPEG (4:2:0), lossless PNG, or WebP."""
    if extension == "jpg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420"))
    buffer = io.BytesIO()
    level = 6 if pixels.size <= _LARGE else 1  # 100 million pixels would take too long
    settings: dict[str, Any] = {"compress_level": level} if extension == "png" else {"quality": quality, "method": 4}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, {"png": "PNG", "webp": "WEBP"}[extension], **settings)
    return buffer.getvalue()
