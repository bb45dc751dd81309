"""Checks a picture strictly and changes it only where a training loader would otherwise see something else.

    prepared = prepare(data, ImageOptions(resize=224))      # .data .extension .width .height .changed; raises Reject

Kept byte for byte: JPEG, PNG and WebP that decode without a warning to upright 8-bit RGB, grey or palette pixels.
Everything else that can be understood is encoded anew, and ``changed`` says why.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_tools.samples.image_header import Header, read_header
from data_tools.samples.reject import Reject

Image.MAX_IMAGE_PIXELS = None  # our own cap is read from the header, and does not warn but reject


@dataclass(frozen=True)
class ImageOptions:
    """What is done to every picture; part of the plan hash."""

    resize: int | None = None
    """Target in pixels; None keeps the bytes of sound pictures."""
    resize_mode: Literal["shorter", "longer", "crop"] = "shorter"
    """Which side becomes ``resize``; ``crop`` makes the shorter side so and cuts the centre square. Never enlarges."""
    filter: Literal["hamming", "bicubic", "lanczos"] = "hamming"
    """Pillow's antialiased filters: hamming takes three fifths of the time of bicubic, which most image processors
    use."""
    encode: Literal["auto", "jpg", "png", "webp"] = "auto"
    """Format of pictures that are encoded anew; auto: PNG for what was lossless, JPEG for the rest."""
    quality: int = 95
    """JPEG and WebP quality of pictures that are encoded anew."""
    min_side: int = 8
    max_aspect: float = 20.0
    max_pixels: int = 100_000_000
    max_bytes: int = 256 << 20


class Prepared(NamedTuple):
    """A picture as it is stored."""

    data: bytes
    extension: str
    width: int
    height: int
    changed: list[str]


def prepare(data: bytes, options: ImageOptions) -> Prepared:
    """The picture as it will be stored. Raises Reject with the reason when it cannot be used."""
    header = read_header(data)
    _check_size(header, options)
    changed = list(header.changes)
    shrink = options.resize is not None and _target(header.width, header.height, options) != (
        header.width,
        header.height,
    )
    if not changed and not shrink:
        check_pixels(data, header)
        return Prepared(data, header.format, header.width, header.height, changed)
    pixels = decode(data, header, options.resize if shrink else None)
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


def check_pixels(data: bytes, header: Header) -> None:
    """Decodes everything that can be wrong, and as few pixels as possible. Raises Reject."""
    if header.format == "jpg":
        try:
            # All entropy-coded data is read, which is where damage shows; the pixels themselves are made at 1/8 of the
            # size and grey.
            simplejpeg.decode_jpeg(data, colorspace="GRAY", min_factor=8)
        except ValueError:
            _decode_jpeg(data, 0)  # RGB-coded files have no grey to take: decide by the whole picture
    else:
        open_image(data, header).close()


def decode(data: bytes, header: Header, resize: int | None = None) -> NDArray[np.uint8]:
    """Upright RGB pixels [height, width, 3], alpha on white. With ``resize``, a large JPEG may come at a fraction of
    its size, but no side shorter than twice ``resize``."""
    if header.format == "jpg" and header.components != 4:
        pixels = _decode_jpeg(data, 2 * resize if resize else 0)
        return _upright(pixels, header.orientation)
    if header.format == "jpg":
        _strict(data, "CMYK", 0)
    return _upright(np.asarray(to_rgb(open_image(data, header))), header.orientation)


def _decode_jpeg(data: bytes, min_side: int) -> NDArray[np.uint8]:
    return _strict(data, "RGB", min_side)


def _strict(data: bytes, colorspace: str, min_side: int) -> NDArray[np.uint8]:
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colorspace=colorspace, min_height=min_side, min_width=min_side
        )
    except ValueError as error:
        raise Reject("truncated" if "Premature end" in str(error) else "corrupt") from None
    return pixels


def open_image(data: bytes, header: Header) -> Image.Image:
    """The first frame, decoded by Pillow. Raises Reject when it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage in metadata, which does not matter to the pixels
            image = Image.open(io.BytesIO(data))
            image.load()
    except Image.DecompressionBombError:
        raise Reject("too_many_pixels") from None
    # Pillow's plugins raise almost anything on damaged data (OSError, SyntaxError, struct.error, IndexError, zlib.error
    # ...).
    except Exception as error:
        raise Reject("truncated" if "truncated" in str(error) else "corrupt") from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB: transparency on white, 16 bits rescaled. Raises Reject for float and 32-bit
    pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Reject("pixel_format")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes an EXIF orientation of 1 .. 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


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
    settings: dict[str, Any] = {"compress_level": 6} if extension == "png" else {"quality": quality, "method": 4}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, {"png": "PNG", "webp": "WEBP"}[extension], **settings)
    return buffer.getvalue()
