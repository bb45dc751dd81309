"""The bad-input catalogue, image by picture: every kind is kept, changed for a stated reason, or rejected by name."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_tools.samples.decoding import check_pixels, decode
from data_tools.samples.image_header import read_header
from data_tools.samples.images import ImageOptions, prepare
from data_tools.samples.reject import Reject
from tests.support.picture_files import encoded, picture, pixels_of, reason

KEEP = ImageOptions()


def close(left: NDArray[np.uint8], right: NDArray[np.uint8], mean: float) -> bool:
    return left.shape == right.shape and float(np.abs(left.astype(int) - right.astype(int)).mean()) <= mean


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (encoded(picture(0), "JPEG"), "jpg"),
        (encoded(picture(0), "JPEG", progressive=True), "jpg"),
        (encoded(Image.fromarray(picture(0)).convert("L"), "JPEG"), "jpg"),
        (encoded(picture(0)), "png"),
        (encoded(Image.fromarray(picture(0)).convert("L")), "png"),
        (encoded(Image.fromarray(picture(0)).convert("P")), "png"),
        (encoded(Image.fromarray(picture(0)).convert("1")), "png"),
        (encoded(picture(0), "WEBP"), "webp"),
    ],
    ids=["jpeg", "progressive", "grey jpeg", "png", "grey png", "palette", "1 bit", "webp"],
)
def test_sound_pictures_keep_their_bytes(data: bytes, extension: str) -> None:
    prepared = prepare(data, KEEP)
    assert (prepared.data, prepared.extension, prepared.width, prepared.height, prepared.changed) == (
        data,
        extension,
        48,
        40,
        [],
    )


def test_not_pictures() -> None:
    assert reason(b"") == "empty_file"
    assert reason(b"<!DOCTYPE html><html>404</html>") == "html"
    assert reason(b"\xef\xbb\xbf\n <HTML>") == "html"
    assert reason(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>') == "svg"
    assert reason(b"%PDF-1.7 something") == "unknown_format"
    assert reason(b"\x00" * 1000) == "unknown_format"
    assert reason(b"\xff\xd8\xff") == "truncated"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_truncated_pictures(format: str, share: float) -> None:
    data = encoded(picture(1, 200, 150), format)
    assert reason(data[: int(len(data) * share)]) in ("truncated", "corrupt", "unknown_format")


def test_truncated_jpeg_is_named_so() -> None:
    data = encoded(picture(1, 200, 150), "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"
    assert reason(data[: len(data) // 2], ImageOptions(resize=32)) == "truncated"


def test_quick_check_rejects_what_a_full_decode_rejects() -> None:
    """Grey pixels at 1/8 of the size see the same damage as all pixels in colour."""
    rng = random.Random(0)
    agree, damaged = 0, 0
    for trial in range(300):
        data = bytearray(
            encoded(picture(trial, 160, 120), "JPEG", quality=90, progressive=trial % 3 == 0, subsampling=trial % 3)
        )
        start = data.index(b"\xff\xda") + 20
        for _ in range(rng.choice([0, 3, 12])):
            data[rng.randrange(start, len(data) - 2)] ^= 1 << rng.randrange(8)
        try:
            simplejpeg.decode_jpeg(bytes(data), strict=True)
            full = True
        except ValueError:
            full = False
        try:
            check_pixels(bytes(data), read_header(bytes(data)))
            quick = True
        except Reject:
            quick = False
        agree += quick == full
        damaged += not full
    assert agree == 300 and damaged > 100


def test_flipped_bits_in_a_png_are_noticed() -> None:
    data = encoded(picture(2))
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.randrange(8, len(data) - 12)] ^= 1 << rng.randrange(8)
        assert reason(bytes(damaged)) in ("corrupt", "truncated", "too_many_pixels", "pixel_format")


def test_16_bit_grey_is_rescaled() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for format in ("PNG", "TIFF"):
        prepared = prepare(encoded(Image.fromarray(ramp), format), KEEP)
        assert prepared.extension == "png" and "16_bit" in prepared.changed
        assert np.array_equal(pixels_of(prepared.data)[..., 0], np.round(ramp / 257).astype(np.uint8))


def test_16_bit_colour_is_rescaled() -> None:
    wide = (picture(3).astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 48, 40, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    prepared = prepare(data, KEEP)
    assert prepared.changed == ["16_bit"] and np.array_equal(pixels_of(prepared.data), picture(3))


def test_float_and_32_bit_pixels_are_rejected() -> None:
    assert reason(encoded(Image.fromarray(np.ones((40, 40), np.float32)), "TIFF")) == "pixel_format"
    assert reason(encoded(Image.fromarray(np.ones((40, 40), np.int32)), "TIFF")) == "pixel_format"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = encoded(picture(4), format, exif=exif, **settings)
    from PIL import ImageOps

    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    prepared = prepare(data, ImageOptions(encode="png"))
    assert np.array_equal(pixels_of(prepared.data), upright) or close(pixels_of(prepared.data), upright, 0.7)
    assert (prepared.height, prepared.width) == upright.shape[:2]
    assert prepared.changed == ([] if orientation == 1 else ["exif_orientation"])


def test_alpha_is_matted_on_white() -> None:
    rgba = np.dstack([picture(5), np.full((40, 48), 0, np.uint8)])
    rgba[:, 24:, 3] = 255
    expected = picture(5).copy()
    expected[:, :24] = 255
    for format, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        prepared = prepare(encoded(rgba, format, **settings), ImageOptions(encode="png"))
        assert "alpha" in prepared.changed
        assert np.array_equal(pixels_of(prepared.data), expected)


def test_grey_alpha_and_transparent_palette() -> None:
    grey = np.dstack([np.full((40, 40), 90, np.uint8), np.zeros((40, 40), np.uint8)])
    assert np.all(pixels_of(prepare(encoded(Image.fromarray(grey, "LA")), KEEP).data) == 255)
    indexed = Image.new("P", (40, 40), 3)
    indexed.putpalette([10, 20, 30] * 256)
    prepared = prepare(encoded(indexed, transparency=3), KEEP)
    assert prepared.changed == ["alpha"] and np.all(pixels_of(prepared.data) == 255)


def test_cmyk_becomes_rgb() -> None:
    flat = np.broadcast_to(np.array([200, 120, 40], np.uint8), (40, 48, 3))
    prepared = prepare(encoded(Image.fromarray(flat.copy()).convert("CMYK"), "JPEG", quality=95), KEEP)
    assert prepared.extension == "jpg" and prepared.changed == ["cmyk"]
    assert close(pixels_of(prepared.data), flat, 3)
    damaged = bytearray(encoded(Image.fromarray(picture(6)).convert("CMYK"), "JPEG"))
    assert reason(bytes(damaged[: len(damaged) // 2])) == "truncated"


def test_animations_give_their_first_frame() -> None:
    frames = [Image.fromarray(picture(seed)) for seed in range(3)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        prepared = prepare(encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True), KEEP)
        assert "first_frame" in prepared.changed, format
        assert close(pixels_of(prepared.data), picture(0), 12 if format in ("GIF",) else 3)


def test_other_formats_are_encoded_and_named() -> None:
    assert prepare(encoded(picture(7), "BMP"), KEEP).changed == ["from_bmp"]
    avif = prepare(encoded(picture(7, 300, 200), "AVIF", quality=95), KEEP)
    assert (
        avif.changed == ["from_avif"]
        and avif.extension == "jpg"
        and close(pixels_of(avif.data), picture(7, 300, 200), 3)
    )


def test_pixel_cap_is_read_from_the_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)) + rows.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(bomb) < 200_000
    tracemalloc.start()
    assert reason(bomb) == "too_many_pixels"
    assert reason(encoded(picture(8, 400, 300), "JPEG"), ImageOptions(max_pixels=100_000)) == "too_many_pixels"
    assert reason(encoded(picture(8, 400, 300), "GIF"), ImageOptions(max_pixels=100_000)) == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_small_and_elongated_pictures() -> None:
    assert reason(encoded(picture(9, 1, 1))) == "too_small"
    assert reason(encoded(picture(9, 1, 5000))) == "too_small"
    assert reason(encoded(picture(9, 10, 5000))) == "too_elongated"
    assert reason(encoded(picture(9, 199, 300)), ImageOptions(min_side=200)) == "too_small"


@pytest.mark.parametrize(("mode", "size"), [("shorter", (80, 64)), ("longer", (64, 51)), ("crop", (64, 64))])
@pytest.mark.parametrize("name", ["hamming", "bicubic", "lanczos"])
def test_resize_modes_against_pillow(name: str, mode: str, size: tuple[int, int]) -> None:
    source = picture(10, 250, 200)
    prepared = prepare(encoded(source), ImageOptions(resize=64, resize_mode=mode, filter=name))  # type: ignore[arg-type]
    assert (prepared.width, prepared.height) == size and prepared.changed == ["resized"] and prepared.extension == "png"
    box = (25, 0, 225, 200) if mode == "crop" else None
    expected = Image.fromarray(source).resize(size, Image.Resampling[name.upper()], box=box)
    assert np.array_equal(pixels_of(prepared.data), np.asarray(expected))


def test_resize_never_enlarges() -> None:
    small = encoded(picture(11, 60, 50), "JPEG")
    assert prepare(small, ImageOptions(resize=64)).data == small
    assert prepare(encoded(picture(11, 300, 50)), ImageOptions(resize=64, resize_mode="crop"))[2:4] == (64, 50)


def test_large_jpegs_decode_at_a_fraction_with_nearly_the_same_pixels() -> None:
    source = picture(12, 1600, 1200)
    data = encoded(source, "JPEG", quality=95)
    assert decode(data, least=(200, 200)).shape[0] == 300  # the smallest eighth that is at least twice 100
    prepared = prepare(data, ImageOptions(resize=100, encode="png"))
    assert close(
        pixels_of(prepared.data), np.asarray(Image.fromarray(source).resize((133, 100), Image.Resampling.HAMMING)), 1.0
    )


def test_encodings() -> None:
    data = encoded(picture(13, 300, 200), "JPEG", quality=95)
    for extension, name in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        prepared = prepare(data, ImageOptions(resize=100, encode=extension))  # type: ignore[arg-type]
        assert prepared.extension == extension and Image.open(io.BytesIO(prepared.data)).format == name


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_fuzzed_pictures_end_in_a_named_outcome(format: str) -> None:
    data = encoded(picture(14), format)
    rng = random.Random(format)
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 30)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            prepared = prepare(bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.3 else damaged), KEEP)
        except Reject:
            continue
        assert (
            Image.open(io.BytesIO(prepared.data)).convert("RGB").size == (prepared.width, prepared.height)
            or prepared.changed
        )
