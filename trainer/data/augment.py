"""Random crops, flips and light colour changes, drawn from (seed, sample position): the number of ranks and workers
never changes a pixel.

Random resized crop as in Inception (arXiv 1409.4842); colour operations are those of RandAugment (arXiv 1909.13719).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from trainer.core.types import Preprocess
from trainer.data.patches import grid_of, pack
from trainer.data.settings import AugmentSettings, DataSettings
from trainer.data.transforms import Pixels, decode, fit, fitted_size, least_size, resize, resized

NUM_DRAWS = 16
"""Uniform numbers a sample may use: 0 the caption, 1 to 4 the crop, 5 the flip, from 6 two for each colour
operation, 14 the view of a stored teacher."""
VIEW = 14

OPERATIONS = ("brightness", "contrast", "saturation", "sharpness", "autocontrast", "posterize")


def picture(image: bytes, settings: DataSettings, preprocess: Preprocess, draws: NDArray[np.float64]) -> torch.Tensor:
    """Encoded bytes -> uint8 pixels as ``fit`` shapes them, augmented as ``settings`` and the sample's [NUM_DRAWS]
    numbers say. Raises Damaged."""
    if settings.augment.active:
        # a crop is resized from fewer pixels than the whole image
        scaling = settings.jpeg_scaling / settings.augment.crop_scale[0] ** 0.5
        pixels = decode(image, settings.max_pixels, least_size(scaling, preprocess))
        return augment(pixels, settings.augment, preprocess, draws)
    return fit(decode(image, settings.max_pixels, least_size(settings.jpeg_scaling, preprocess)), preprocess)


def augment(
    pixels: Pixels, settings: AugmentSettings, preprocess: Preprocess, draws: NDArray[np.float64]
) -> torch.Tensor:
    """[h, w, 3] uint8 and the sample's [NUM_DRAWS] numbers in [0, 1) -> uint8 in the shape that ``fit`` makes."""
    if settings.crops:
        top, left, height, width = _crop_box(pixels.shape[:2], settings, preprocess, draws[1:5])
        size = fitted_size((height, width), preprocess) if preprocess.resize == "patches" else preprocess.image_size
        planes = resize(pixels[top : top + height, left : left + width], size, preprocess.resample)
    else:
        planes = resized(pixels, preprocess)
    if draws[5] < settings.flip:
        planes = planes.flip(2)
    if settings.randaugment:
        planes = _recolour(planes, settings, draws[6:])
    return pack(planes, *grid_of(preprocess)) if preprocess.resize == "patches" else planes


def _crop_box(
    shape: tuple[int, int], settings: AugmentSettings, preprocess: Preprocess, draws: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop. A side that would exceed the image is clipped instead of drawn
    again."""
    height, width = shape
    least, most = settings.crop_scale
    area = height * width * (least + (most - least) * draws[0])
    low, high = (math.log(ratio) for ratio in settings.crop_ratio)
    ratio = math.exp(low + (high - low) * draws[1])
    if preprocess.resize != "crop":
        ratio *= width / height
    crop_height = min(height, max(1, round(math.sqrt(area / ratio))))
    crop_width = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(draws[2] * (height - crop_height + 1)), int(draws[3] * (width - crop_width + 1)), crop_height, crop_width


def _recolour(planes: torch.Tensor, settings: AugmentSettings, draws: NDArray[np.float64]) -> torch.Tensor:
    image = Image.fromarray(np.ascontiguousarray(planes.permute(1, 2, 0).numpy()))
    for index in range(settings.randaugment):
        which, how = draws[2 * index], draws[2 * index + 1]
        image = _apply(image, OPERATIONS[int(which * len(OPERATIONS))], settings.magnitude, 2 * how - 1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _apply(image: Image.Image, operation: str, magnitude: float, how: float) -> Image.Image:
    factor = 1 + 0.9 * magnitude * how  # how in [-1, 1): weaker or stronger, never a blank image
    match operation:
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(factor)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(factor)
        case "saturation":
            return ImageEnhance.Color(image).enhance(factor)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(factor)
        case "autocontrast":
            return ImageOps.autocontrast(image)
    return ImageOps.posterize(image, 8 - round(4 * magnitude * abs(how)))
