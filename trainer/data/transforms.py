"""Bytes of an image -> uint8 pixels as the model wants them.

Decoding is that of data_tools, strict and with its limits (data_tools/samples/decoding.py). Resizing is torch's
antialiased uint8 interpolation, which gives Pillow's pixels (mean difference 0.002 of 255, at most 1) in a sixth of the
time, so that evaluation sees what the checkpoint's own image processor would have made.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from data_tools.samples import decoding
from data_tools.samples.image_header import Limits
from data_tools.samples.reject import Reject
from trainer.core.types import Preprocess
from trainer.data.patches import grid_of, native_size, pack

Pixels = NDArray[np.uint8]

MAX_ASPECT = 16
"""Images longer than this are cut to it before a centre crop: resizing 1 x 5000 by its shorter side would cost
gigabytes."""


class Damaged(Exception):
    """A sample that cannot be used, and why in a few words. It is replaced and counted, never fatal."""


def decode(data: bytes, max_pixels: int, least: tuple[int, int] = (0, 0)) -> Pixels:
    """Encoded bytes -> [h, w, 3] uint8 RGB, upright, on white. Raises Damaged.

    ``least`` (height, width), where given, lets a JPEG be decoded at a smaller M/8 size that is not below it.
    """
    try:
        return np.ascontiguousarray(decoding.decode(data, Limits(max_pixels), least))
    except Reject as reject:
        if reject.reason == "too_many_pixels":
            raise Damaged(f"{reject.path or 'too many'} pixels are above data.max_pixels") from None
        detail = f" ({reject.path})" if reject.path else ""
        raise Damaged(f"not decodable: {reject.reason}{detail}") from None


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
    """(height, width) to which an image of ``shape`` is resized before the centre is cut, with Hugging Face's
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
    """``fit`` before an image's patches are put side by side: [3, height, width] uint8, of whole patches for
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
        return 0, 0  # the size depends on the image's own
    height, width = preprocess.image_size
    return (round(height * scaling), round(width * scaling)) if scaling else (0, 0)
