"""The augmentations of DataCompDR, replayed from its ``paug.json``: a crop of the original image, resized, and two of
torchvision's RandAugment operations with recorded magnitudes (arXiv 2311.17049, section 3.1; apple/ml-mobileclip,
training/dr/transforms.py). They are Pillow's, as torchvision applies them: equal to torchvision 0.29's in every pixel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from trainer.data.transforms import Damaged, Pixels, resize

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
ENHANCE = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}


def replay(pixels: Pixels, parameters: Any, size: tuple[int, int]) -> torch.Tensor:
    """[h, w, 3] uint8 and ``[[top, left, height, width], [[operation, magnitude], ...] or null]`` -> [3, *size] uint8.
    Raises Damaged where the parameters are of another form, or of another image."""
    try:
        (top, left, height, width), operations = parameters
        steps = [(OPERATIONS[number], float(magnitude)) for number, magnitude in operations or []]
        box = [int(value) for value in (top, left, height, width)]
    except (TypeError, ValueError, IndexError):
        raise Damaged("its paug.json is not of a crop and RandAugment") from None
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > len(pixels) or left + width > pixels.shape[1]:
        raise Damaged("the crop in its paug.json is outside the image, which has another size than it had there")
    planes = resize(pixels[top : top + height, left : left + width], size, "bicubic")
    if not steps:
        return planes
    image = Image.fromarray(np.ascontiguousarray(planes.permute(1, 2, 0).numpy()))
    try:
        for operation, magnitude in steps:
            image = apply(image, operation, magnitude)
    except (ValueError, OverflowError) as error:
        raise Damaged(f"its paug.json has an impossible magnitude ({error})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def apply(image: Image.Image, operation: str, magnitude: float) -> Image.Image:
    """One operation, with torchvision's meaning of its magnitude, nearest-neighbour sampling and black borders."""
    if operation in ENHANCE:
        return ENHANCE[operation](image).enhance(1.0 + magnitude)
    match operation:
        case "ShearX":
            return _affine(image, (1, magnitude, 0, 0, 1, 0))
        case "ShearY":
            return _affine(image, (1, 0, 0, magnitude, 1, 0))
        case "TranslateX":
            return _affine(image, (1, 0, -int(magnitude), 0, 1, 0))
        case "TranslateY":
            return _affine(image, (1, 0, 0, 0, 1, -int(magnitude)))
        case "Rotate":
            return image.rotate(magnitude)
        case "Posterize":
            return ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            return ImageOps.solarize(image, math.ceil(magnitude))  # values are integers: the same as below it
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
