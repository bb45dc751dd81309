"""Bytes of a picture -> uint8 pixels as the model wants them.

JPEGs are decoded strictly by simplejpeg (libjpeg-turbo: damage is an error, not grey blocks), everything else by
Pillow. Resizing is torch's antialiased uint8 interpolation, which gives Pillow's pixels (mean difference 0.002 of 255,
at most 1) in a sixth of the time, so that evaluation sees what the checkpoint's own image processor would have made.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from trainer.core.types import Preprocess
from trainer.data.patches import grid_of, native_size, pack

Pixels = NDArray[np.uint8]

MAX_ASPECT = 16
"""Pictures longer than this are cut to it before a centre crop: resizing 1 x 5000 by its shorter side would cost
gigabytes."""
ORIENTATION = 0x0112


# Pillow warns of large pictures, odd EXIF and palettes with transparency: each is dealt with here, or is a damaged
# sample.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Damaged(Exception):
    """A sample that cannot be used, and why in a few words. It is replaced and counted, never fatal."""


def decode(data: bytes, max_pixels: int, least: tuple[int, int] = (0, 0)) -> Pixels:
    """Encoded bytes -> [h, w, 3] uint8 RGB, upright, on white. Raises Damaged.

    ``least`` (height, width), where given, lets a JPEG be decoded at a smaller M/8 size that is not below it.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _decode_jpeg(data, max_pixels, least)
        return _decode_other(data, max_pixels)
    except Damaged:
        raise
    except (
        ValueError,
        OSError,
        SyntaxError,
        EOFError,
        IndexError,
        TypeError,
        KeyError,
        OverflowError,
        Image.DecompressionBombError,
    ) as error:
        # what the decoders raise on hostile bytes; a MemoryError or a fault of ours still surfaces
        raise Damaged(f"not decodable ({' '.join(str(error).split())[:80]})") from error


def _decode_jpeg(data: bytes, max_pixels: int, least: tuple[int, int]) -> Pixels:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > max_pixels:
        raise Damaged(f"{width} x {height} pixels are above data.max_pixels")
    if space in ("CMYK", "YCCK"):
        return _decode_other(data, max_pixels)
    turn = _orientation(data)
    if turn >= 5:
        least = least[::-1]
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    return pixels if turn == 1 else _upright(pixels, turn)


def _orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of a JPEG; 1 where there is none."""
    if b"Exif\0\0" not in data[:65536]:
        return 1
    with Image.open(io.BytesIO(data)) as image:
        turn = image.getexif().get(ORIENTATION, 1)
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _upright(pixels: Pixels, turn: int) -> Pixels:
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):  # after the transposition the remaining turns are mirrors of one or both axes
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _decode_other(data: bytes, max_pixels: int) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise Damaged(f"{image.width} x {image.height} pixels are above data.max_pixels")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image)


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise Damaged("32-bit grey picture")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise Damaged("floating-point picture")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def resize(pixels: Pixels, size: tuple[int, int], resample: str) -> torch.Tensor:
    """[h, w, 3] uint8 -> [3, height, width] uint8, antialiased, in Pillow's order of passes and with its rounding."""
    planes = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)
    height, width = planes.shape[1:]
    if (height, width) == size:
        return planes
    if resample == "nearest":
        return planes[:, _nearest(height, size[0])[:, None], _nearest(width, size[1])]
    if height - size[0] > 2 * max(
        0, width - size[1]
    ):  # here Pillow 13 resizes columns first; torch always begins with rows
        planes = _interpolate(planes, (size[0], width), resample)
    return _interpolate(planes, size, resample)


def _nearest(old: int, new: int) -> torch.Tensor:
    """[new] the pixels that Pillow takes: it adds up steps in float64, which decides where a position falls between
    two."""
    steps = np.full(new, old / new)
    steps[0] /= 2
    return torch.from_numpy(np.cumsum(steps).astype(np.int64))


def _interpolate(planes: torch.Tensor, size: tuple[int, int], resample: str) -> torch.Tensor:
    return interpolate(planes[None], size=size, mode=resample, antialias=True, align_corners=False)[0]


def fitted_size(shape: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) to which a picture of ``shape`` is resized before the centre is cut, with Hugging Face's
    rounding."""
    (height, width), (to_height, to_width) = shape, preprocess.image_size
    if preprocess.resize == "squash":
        return preprocess.image_size
    if preprocess.resize == "patches":
        return native_size(shape, *grid_of(preprocess))
    if height * to_width <= width * to_height:
        return to_height, max(to_width, int(to_height * width / height))
    return max(to_height, int(to_width * height / width)), to_width


def fit(pixels: Pixels, preprocess: Preprocess) -> torch.Tensor:
    """[h, w, 3] uint8 -> [3, *preprocess.image_size] uint8 as the checkpoint's image processor makes it, but for
    normalisation."""
    fitted = resized(pixels, preprocess)
    return pack(fitted, *grid_of(preprocess)) if preprocess.resize == "patches" else fitted


def resized(pixels: Pixels, preprocess: Preprocess) -> torch.Tensor:
    """``fit`` before a picture's patches are put side by side: [3, height, width] uint8, of whole patches for
    NaFlex."""
    if preprocess.resize == "crop":
        pixels = _cut_aspect(pixels)
    fitted = resize(pixels, fitted_size(pixels.shape[:2], preprocess), preprocess.resample)
    if preprocess.resize != "crop":
        return fitted
    height, width = preprocess.image_size
    top, left = (fitted.shape[1] - height) // 2, (fitted.shape[2] - width) // 2
    return fitted[:, top : top + height, left : left + width]


def _cut_aspect(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    short = min(height, width) * MAX_ASPECT
    top, left = max(0, height - short) // 2, max(0, width - short) // 2
    return pixels[top : top + short, left : left + short]


def least_size(scaling: float, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) below which a JPEG must not be decoded; (0, 0) asks for full size."""
    if preprocess.resize == "patches":
        return 0, 0  # the size depends on the picture's own
    height, width = preprocess.image_size
    return (round(height * scaling), round(width * scaling)) if scaling else (0, 0)
