"""The one way from an image's bytes to upright RGB pixels, for `shard` and `verify`, training, evaluation and search.

    pixels = decode(data, Limits(max_pixels=10**8))          # [height, width, 3] uint8; raises Reject

JPEGs are decoded strictly by libjpeg-turbo: damage is an error, not grey blocks. Other formats are decoded by Pillow.
Formats other than JPEG, PNG and WebP, and very large images, are decoded in the sandbox.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms

from data_tools.samples.image_header import LIMITS, Header, Limits, cheap_header, in_sandbox, read_here
from data_tools.samples.jpeg_faults import mend
from data_tools.samples.orientation import upright
from data_tools.samples.reject import Reject

T = TypeVar("T")
Pixels = NDArray[np.uint8]
_BAND = 1 << 20
"""Pixels that are laid on white at once."""
_REPAIRS = 4
"""Different harmless faults to mend in one JPEG."""


def decode(data: bytes, limits: Limits = LIMITS, least: tuple[int, int] = (0, 0)) -> Pixels:
    """Upright RGB pixels [height, width, 3], alpha on white. With ``least`` (height, width of the upright image), a
    large JPEG may come at a smaller M/8 size that is not below it. Raises Reject."""
    header = cheap_header(data)
    if header is None:
        pixels: Pixels = in_sandbox("decoding:decode_within", (data, limits, least), limits)
        return pixels
    return _decode(data, header, limits, least)


def decode_within(data: bytes, limits: Limits, least: tuple[int, int]) -> Pixels:
    """``decode`` in this process."""
    return np.ascontiguousarray(_decode(data, read_here(data, limits.formats), limits, least))


def _decode(data: bytes, header: Header, limits: Limits, least: tuple[int, int]) -> Pixels:
    if header.width * header.height > limits.max_pixels:
        raise Reject("too_many_pixels", f"{header.width} x {header.height}")
    return decode_here(data, header, least)[0]


def check(data: bytes, limits: Limits = LIMITS) -> None:
    """Decodes everything that can be wrong. Raises Reject."""
    header = cheap_header(data)
    if header is None:
        in_sandbox("decoding:decode_within", (data, limits, (0, 0)), limits)
    else:
        check_pixels(data, header)


def check_pixels(data: bytes, header: Header) -> tuple[bytes, list[str]]:
    """(The image's bytes, harmless faults that were mended in them). Decodes everything that can be wrong, and as few
    pixels as possible. Raises Reject."""
    if header.format != "jpg":
        open_image(data, header).close()
        return data, []
    try:
        # All entropy-coded data is read, which is where damage shows; the pixels themselves are made at 1/8 of the
        # size and grey.
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_factor=8)
    except ValueError:
        # RGB-coded files have no grey to take: decide by the whole image
        _, data, notes = _strictly(data, lambda sound: simplejpeg.decode_jpeg(sound, colorspace=_space(header)))
        return data, notes
    return data, []


def decode_here(
    data: bytes, header: Header, least: tuple[int, int] = (0, 0), profile: bytes | None = None
) -> tuple[Pixels, list[str]]:
    """(``decode``, harmless faults) in this process; from ``profile``, where given, converted to sRGB."""
    if header.format != "jpg":
        image = open_image(data, header)
        image, notes = (to_srgb(image, profile), ["icc_profile"]) if profile else (image, [])
        return upright(to_rgb(image), header.orientation), notes
    height, width = least[::-1] if header.orientation >= 5 else least
    pixels, sound, notes = _strictly(
        data, lambda sound: simplejpeg.decode_jpeg(sound, _space(header), min_height=height, min_width=width)
    )
    if header.components == 4 or profile:  # Pillow knows which inks are inverted
        image = Image.fromarray(pixels) if header.components != 4 else open_image(sound, header)
        pixels = to_rgb(to_srgb(image, profile) if profile else image)
        notes = [*notes, "icc_profile"] if profile else notes
    return upright(pixels, header.orientation), notes


def _space(header: Header) -> str:
    return "CMYK" if header.components == 4 else "RGB"


def _strictly(data: bytes, decoder: Callable[[bytes], T]) -> tuple[T, bytes, list[str]]:
    """(What ``decoder`` makes of a JPEG, the JPEG without harmless faults, their names). Raises Reject."""
    notes: list[str] = []
    for _ in range(_REPAIRS):
        try:
            return decoder(data), data, notes
        except ValueError as error:
            data, note = mend(data, str(error))
            notes.append(f"mended_{note}")
    raise Reject("corrupt")


def open_image(data: bytes, header: Header) -> Image.Image:
    """The first image of a file, decoded by Pillow. Raises Reject when it is damaged."""
    if Image.MAX_IMAGE_PIXELS and header.width * header.height > Image.MAX_IMAGE_PIXELS:
        # --max-pixels was asked to be above Pillow's own limit, which stays the second line for what containers hold
        Image.MAX_IMAGE_PIXELS = header.width * header.height
    try:
        image = Image.open(io.BytesIO(data), formats=(header.pillow_format,))
        image.load()
    except Image.DecompressionBombError:
        raise Reject("too_many_pixels") from None
    except MemoryError:
        raise Reject("too_much_memory") from None
    # Pillow's plugins raise almost anything on damaged data (OSError, SyntaxError, struct.error, IndexError, zlib.error
    # ...).
    except Exception as error:
        raise Reject("truncated" if "truncated" in str(error) else "corrupt") from None
    return image


def to_rgb(image: Image.Image) -> Pixels:
    """Any Pillow mode as 8-bit RGB [height, width, 3]: transparency on white, 16 bits rescaled. Raises Reject for float
    and 32-bit pixels."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # both 0 .. 65535
        wide = np.asarray(image).astype(np.uint32)
        grey = ((wide + 128) // 257).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[wide == clear] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise Reject("pixel_format", "32-bit grey" if image.mode == "I" else "floating-point")
    try:
        return _on_white(image)
    except ValueError as error:  # Pillow converts some modes to none that is of use here
        raise Reject("pixel_format", str(error)) from None


def _on_white(image: Image.Image) -> Pixels:
    if not image.has_transparency_data:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):  # in bands: whole images would be copied four times
        band = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        pixels[top : top + rows] = np.asarray(Image.alpha_composite(white, band).convert("RGB"))
    return pixels


def foreign_profile(data: bytes, header: Header) -> bytes | None:
    """The colour profile of an image that is not in sRGB; None without one, or where littlecms cannot read it."""
    if header.format in ("jpg", "png", "webp") and not any(name in data for name in (b"ICC_PROFILE", b"iCCP", b"ICCP")):
        return None
    try:
        profile = Image.open(io.BytesIO(data), formats=(header.pillow_format,)).info.get("icc_profile")
        if not profile:
            return None
        description = ImageCms.getProfileDescription(_profile(profile))
    except (OSError, ValueError, SyntaxError, ImageCms.PyCMSError):
        return None
    return None if "sRGB" in description else bytes(profile)


def _profile(data: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(data))


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image converted by littlecms: relative colorimetric, with black-point compensation; unchanged where the
    profile is of another kind of pixels."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    source = image if image.mode in ("L", "CMYK", "RGB") and alpha is None else image.convert("RGB")
    settings: dict[str, Any] = {
        "renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC,
        "flags": ImageCms.Flags.BLACKPOINTCOMPENSATION,
    }
    try:
        converted = ImageCms.profileToProfile(
            source, _profile(profile), ImageCms.createProfile("sRGB"), outputMode="RGB", **settings
        )
    except ImageCms.PyCMSError:
        return image
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
