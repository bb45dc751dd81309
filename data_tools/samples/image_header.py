"""Reads an image's header without decoding it: format, size, orientation, and what in it needs changing.

JPEG, PNG and WebP headers are read here; those of other formats by Pillow's plugins, in the sandbox.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from data_tools.samples import sandbox
from data_tools.samples.formats import allowed, name_other
from data_tools.samples.jpeg_faults import MARKER, is_frame
from data_tools.samples.orientation import orientation_of
from data_tools.samples.reject import Reject

_TEXT_START = b"\xef\xbb\xbf \t\r\n"
_MAGIC = (b"GIF8", b"II*\0", b"MM\0*")
_CODESTREAM = b"\xff\x4f\xff\x51"
_MAX_TEXT = 1 << 20

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of damage that strict decoding decides on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Limits:
    """What decoding one image may cost."""

    max_pixels: int = 100_000_000
    formats: tuple[str, ...] = ()
    """Names of rare formats (``formats.ON_REQUEST``) to read as well."""
    max_memory: int = 1536
    """MiB that the sandbox may allocate."""
    max_seconds: float = 20.0
    """Processor seconds in the sandbox."""


LIMITS = Limits()
_CHEAP_PIXELS, _CHEAP_SCANS = 25_000_000, 64
"""Limits of a JPEG, PNG or WebP that is decoded in the caller's process: at most 0.6 GB and about 3 seconds."""


@dataclass
class Header:
    """What is known of an image before its pixels are. ``width`` and ``height`` are those of the upright image."""

    format: str
    """jpg, png, webp or, for the rest, Pillow's name in lower case."""
    width: int
    height: int
    lossless: bool
    components: int = 3
    orientation: int = 1
    """By which the decoded pixels must be turned, 1 (upright) .. 8."""
    changes: list[str] = field(default_factory=list)
    """Why the bytes cannot be kept."""
    scans: int = 1
    """Of a progressive JPEG: each costs a pass over all pixels."""

    @property
    def pillow_format(self) -> str:
        """Pillow's name of the format."""
        return "JPEG" if self.format == "jpg" else self.format.upper()


def read_header(data: bytes, limits: Limits = LIMITS) -> Header:
    """The header of an image in memory. Raises Reject with the reason when it is none."""
    return cheap_header(data) or in_sandbox("image_header:read_here", (data, limits.formats), limits)


def in_sandbox(function: str, arguments: tuple[object, ...], limits: Limits) -> Any:
    """What a function of this package returns in the sandbox, or here if this is the sandbox. Raises Reject."""
    call = sandbox.answer if sandbox.inside() else sandbox.call
    return call(f"data_tools.samples.{function}", arguments, limits.max_memory, limits.max_seconds)


def cheap_header(data: bytes) -> Header | None:
    """The header of a JPEG, PNG or WebP of usual size; None for what must be decoded in the sandbox. Raises Reject."""
    known = _known(data)
    if not known:
        return None
    header = read_here(data)
    cheap = header.width * header.height <= _CHEAP_PIXELS and header.scans <= _CHEAP_SCANS
    return header if cheap else None


def read_here(data: bytes, formats: Sequence[str] = ()) -> Header:
    """``read_header`` in this process."""
    known = _known(data)
    header = _jpeg(data) if known == "jpg" else _png(data) if known == "png" else _pillow(data, known, formats)
    if header.orientation != 1:
        header.changes.append("exif_orientation")
        if header.orientation >= 5:
            header.width, header.height = header.height, header.width
    return header


def _known(data: bytes) -> str:
    """jpg, png, webp, or nothing for other formats. Raises Reject for what is no image."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if not data:
        raise Reject("empty_file")
    head = data[:1024].lstrip(_TEXT_START).lower()
    if head.startswith(b"<"):
        raise Reject("svg" if b"<svg" in head else "html")
    return ""


def _jpeg(data: bytes) -> Header:
    exif, xmp, at = b"", b"", 2
    while at + 4 <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # junk or fill bytes: strict decoding decides on them
            marker = MARKER.search(data, at)
            if marker is None:
                break
            at = marker.end() - 2
            continue
        code = data[at + 1]
        if code in (0x01, *range(0xD0, 0xD8)):
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if code == 0xE1:
            body = data[at + 4 : at + 2 + length]
            if body[:6] == b"Exif\0\0":
                exif = exif or body
            elif body[:29] == b"http://ns.adobe.com/xap/1.0/\0":
                xmp = body
        elif is_frame(code):
            if at + 10 > len(data):
                break
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            if data[at + 4] != 8 or not width or not height:
                raise Reject("pixel_format" if width and height else "corrupt")
            changes = ["cmyk"] if data[at + 9] == 4 else []
            orientation = orientation_of(exif, xmp) if exif or xmp else 1
            scans = data.count(b"\xff\xda") if code in (0xC2, 0xCA) else 4
            return Header("jpg", width, height, False, data[at + 9], orientation, changes, scans)
        elif code in (0xD9, 0xDA) or length < 2:
            raise Reject("corrupt")
        at += 2 + length
    raise Reject("truncated")


def _png(data: bytes) -> Header:
    """Walks all chunks and checks their checksums, which Pillow does not for pixel data."""
    at, changes, ended = 8, [], False
    exif = xmp = b""
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
            exif = data[at + 8 : at + 8 + length]
        elif kind in (b"iTXt", b"zTXt", b"tEXt"):
            exif, xmp = _png_text(data[at + 8 : at + 8 + length], kind, exif, xmp)
        elif kind == b"IEND":
            ended = True
            break
        at += 12 + length
    if not width or not height:
        raise Reject("corrupt" if ended else "truncated")
    if not ended:
        raise Reject("truncated")
    return Header("png", width, height, True, orientation=orientation_of(exif, xmp), changes=changes)


def _png_text(chunk: bytes, kind: bytes, exif: bytes, xmp: bytes) -> tuple[bytes, bytes]:
    """EXIF and XMP with those of a text chunk: ImageMagick's raw profile in hexadecimal, or Adobe's XMP."""
    keyword, _, rest = chunk.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
        return exif, xmp
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    text = rest if kind == b"tEXt" else rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        text = zlib.decompressobj().decompress(text, _MAX_TEXT) if packed else text
        if keyword == b"Raw profile type exif" and not exif:
            exif = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, ValueError):
        return exif, xmp  # damaged metadata of a sound image
    return exif, text if keyword == b"XML:com.adobe.xmp" else xmp


def _pillow(data: bytes, known: str, formats: Sequence[str]) -> Header:
    names = ("WEBP",) if known == "webp" else allowed(formats)
    try:
        image = Image.open(io.BytesIO(data), formats=names)
        return _inspect(image, known, data)
    except Image.DecompressionBombError:
        raise Reject("too_many_pixels") from None
    except MemoryError:
        raise
    # Pillow's plugins raise almost anything on damaged headers.
    except Exception:
        if known or data[:4] in _MAGIC:
            raise Reject("corrupt") from None
    other = name_other(data)
    raise Reject("unknown_format" if not other else "corrupt" if other in formats else "rare_format", other)


def _inspect(image: Image.Image, known: str, data: bytes) -> Header:
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
    width, height = image.size
    orientation = 1
    if name == "tiff":  # Pillow turns TIFFs while it loads them, and gives their upright size before
        if image.getexif().get(0x0112, 1) in range(2, 9):
            changes.append("exif_orientation")
    else:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        orientation = orientation_of(image.info.get("exif") or b"", xmp.encode() if isinstance(xmp, str) else xmp)
    if name == "jpeg2000":
        inner = data.find(_CODESTREAM) + 8  # what is allocated is the codestream's size, not the container's
        if inner > 8:
            width = max(width, int.from_bytes(data[inner : inner + 4], "big"))
            height = max(height, int.from_bytes(data[inner + 4 : inner + 8], "big"))
    lossless = name not in ("webp", "avif", "jpeg2000")
    return Header(name, width, height, lossless, orientation=orientation, changes=changes)
