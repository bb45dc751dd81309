"""Faults, orientation, formats, limits and colour of pictures: issue by issue, with the right pixels."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageOps

from data_tools.samples import sandbox
from data_tools.samples.decoding import check, decode
from data_tools.samples.formats import NEVER, ON_REQUEST, USUAL
from data_tools.samples.image_header import Limits, read_header
from data_tools.samples.images import ImageOptions, prepare
from data_tools.samples.jpeg_faults import FAULTS
from data_tools.samples.orientation import orientation_of
from data_tools.samples.reject import REASONS, Reject
from tests.support.picture_files import encoded, picture, pixels_of, reason, shard, write_pairs

KEEP, EXACT = ImageOptions(), ImageOptions(encode="png")
JPEG = encoded(picture(0, 64, 48), "JPEG", quality=90)
SCAN = JPEG.index(b"\xff\xda")
README = (Path(__file__).parent.parent / "data_tools/README.md").read_text()


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def test_every_format_of_pillow_is_decided_on() -> None:
    Image.init()
    assert set(Image.OPEN) <= {*USUAL, *ON_REQUEST, *NEVER}
    assert not set(USUAL) & {*ON_REQUEST, *NEVER} and not set(ON_REQUEST) & set(NEVER)
    assert ", ".join(ON_REQUEST) in README and all(name in README for name in NEVER)


def test_readme_names_every_fault_and_reason() -> None:
    for fault in FAULTS:
        assert f"mended_{fault.note}" in README, fault
    assert set(re.findall(r"^\| `([a-z0-9_]+)` \|", README, re.MULTILINE)) >= set(REASONS)


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (JPEG[:20] + b"hello" + JPEG[20:], "junk_bytes"),
        (JPEG[:20] + b"\xff\0\0\2" + JPEG[20:], "junk_bytes"),
        (JPEG[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\7") + JPEG[20:], "adobe_marker"),
        (JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\1"), "jfif_version"),
        (JPEG[: SCAN + 11] + b"\0\0\0" + JPEG[SCAN + 14 :], "scan_header"),
        (JPEG[:-2], "end_marker"),
        (JPEG[:-2] + bytes(9) + JPEG[-2:], "padding"),
    ],
    ids=["junk", "ff00", "adobe", "jfif", "scan header", "no end", "zeros"],
)
def test_harmless_faults_are_mended_and_named(data: bytes, note: str) -> None:
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(data)
    prepared = prepare(data, KEEP)
    assert prepared.changed == [f"mended_{note}"] and prepared.extension == "jpg"
    assert np.array_equal(simplejpeg.decode_jpeg(prepared.data), simplejpeg.decode_jpeg(JPEG))  # strict: no warning
    assert JPEG[SCAN + 14 : -2] in prepared.data
    assert np.array_equal(decode(data), simplejpeg.decode_jpeg(JPEG))
    check(data)
    assert prepare(data, ImageOptions(resize=20)).changed == [f"mended_{note}", "resized"]


def test_several_harmless_faults_at_once() -> None:
    data = JPEG[:2] + segment(0xE1, b"Exif\0\0garbage") + b"x" + JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\1")[2:-2]
    prepared = prepare(data, KEEP)
    assert sorted(prepared.changed) == ["mended_end_marker", "mended_jfif_version", "mended_junk_bytes"]
    assert np.array_equal(simplejpeg.decode_jpeg(prepared.data), simplejpeg.decode_jpeg(JPEG))


def test_lost_pixels_are_rejected() -> None:
    assert reason(JPEG[:-40]) == "truncated"
    assert reason(JPEG[:-2] + b"pixels" + JPEG[-2:]) == "corrupt"
    progressive = encoded(picture(0, 64, 48), "JPEG", progressive=True)
    assert reason(progressive[:-2]) == "truncated"
    assert reason(progressive[: progressive.rindex(b"\xff\xda")]) == "truncated"


def test_mended_pictures_are_counted_in_the_manifest(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "in", 3)
    first = next(iter(sorted((tmp_path / "in").glob("*.jp*g"))))
    first.write_bytes(JPEG[:20] + b"junk" + JPEG[20:])
    shard(table, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["changed"] == {
        "00000.tar": {"mended_junk_bytes": 1}
    }


def turned(format: str, by: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    exact = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "TIFF": {}}.get(format, {"lossless": True})
    if format == "AVIF":
        exact = {"quality": 100, "subsampling": "4:4:4"}
    if by == "exif":
        return encoded(picture(4), format, exif=exif, **exact)
    if format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=orientation % 2 == 0)
        return encoded(picture(4), "PNG", pnginfo=text)
    return encoded(picture(4), format, xmp=xmp, **exact)


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
@pytest.mark.parametrize(
    ("format", "by"),
    [("TIFF", "exif"), ("AVIF", "exif"), *((format, "xmp") for format in ("JPEG", "PNG", "WEBP", "AVIF"))],
)
def test_every_format_is_turned_once(format: str, by: str, orientation: int) -> None:
    data = turned(format, by, orientation)
    image = Image.open(io.BytesIO(data))
    image.load()
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (expected.shape == (48, 40, 3)) == (orientation >= 5)
    prepared, header = prepare(data, EXACT), read_header(data)
    assert (header.height, header.width) == (prepared.height, prepared.width) == expected.shape[:2]
    assert np.abs(decode(data).astype(int) - expected).max() <= (1 if format == "JPEG" else 0)
    assert np.array_equal(pixels_of(prepared.data), decode(data)) and "exif_orientation" in prepared.changed


def test_exif_is_read_before_xmp_and_nonsense_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert orientation_of(exif.tobytes(), b'tiff:Orientation="3"') == 6
    assert orientation_of(b"", b"<tiff:Orientation>3</tiff:Orientation>") == 3
    assert orientation_of(b"Exif\0\0garbage", b"") == orientation_of(b"", b'tiff:Orientation="9"') == 1


def test_rare_formats_are_read_on_request_only() -> None:
    icon = encoded(picture(1, 32, 32), "ICO", sizes=[(32, 32)])
    with pytest.raises(Reject) as caught:
        prepare(icon, KEEP)
    assert (caught.value.reason, caught.value.path) == ("rare_format", "ICO")
    assert np.array_equal(pixels_of(prepare(icon, ImageOptions(formats=("ICO",))).data), picture(1, 32, 32))
    assert reason(encoded(picture(1), "EPS")) == "rare_format"
    assert reason(b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(64)) == "rare_format"


def test_a_container_cannot_hide_a_large_picture() -> None:
    """The size of a JPEG 2000 codestream decides, whatever the JP2 header or an ICNS around it says."""
    data = bytearray(encoded(picture(2, 64, 64), "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 40_000, 40_000)
    assert reason(bytes(data)) == "too_many_pixels"
    inner = bytes(data)
    icns = b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic07" + struct.pack(">I", 8 + len(inner)) + inner
    started = time.process_time()
    assert reason(icns, ImageOptions(formats=("ICNS",))) in ("corrupt", "too_many_pixels", "too_much_memory")
    assert time.process_time() - started < 2


def hog(size: int) -> int:
    return len(bytearray(size))


def divide() -> float:
    return 1 / int("0")


def spin() -> None:
    while True:
        pass


def test_the_sandbox_enforces_its_limits_and_goes_on() -> None:
    box = sandbox.Sandbox()
    here = f"{__name__}:"
    try:
        assert box.call(here + "hog", (50 << 20,), 200, 10) == 50 << 20
        with pytest.raises(Reject, match="too_much_memory"):
            box.call(here + "hog", (300 << 20,), 200, 10)
        with pytest.raises(Reject, match="too_slow"):
            box.call(here + "spin", (), 200, 0.2)
        with pytest.raises(Reject, match="decoder_crashed"):
            box.call("os:abort", (), 200, 10)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            box.call(here + "divide", (), 200, 10)
        assert box.call(here + "hog", (1,), 200, 10) == 1
    finally:
        box.close()


def test_a_forked_process_has_a_sandbox_of_its_own() -> None:
    data = encoded(picture(1), "GIF")
    expected = decode(data)
    child = os.fork()
    if not child:
        same = np.array_equal(decode(data), expected)
        sandbox._SANDBOX.close()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(decode(data), expected)


def test_the_sandbox_works_above_1024_open_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with contextlib.ExitStack() as stack:
        highest = -1
        while highest < 1100:
            highest = stack.enter_context(open(tmp_path / "file")).fileno()
        sandbox._SANDBOX.close()  # its pipes are opened now, above the limit of select()
        assert decode(encoded(picture(1), "GIF")).shape == (40, 48, 3)
    sandbox._SANDBOX.close()


def test_pillows_own_limit_stays_on() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    large = encoded(Image.new("1", (6000, 5000)), "PNG")  # 30 million pixels: decoded in the sandbox
    assert prepare(large, KEEP).data == large
    assert reason(large, ImageOptions(max_pixels=29_000_000)) == "too_many_pixels"
    with pytest.raises(Reject, match="too_many_pixels"):
        decode(large, Limits(max_pixels=29_000_000))


def profile_of(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()  # type: ignore[arg-type]


def swapped() -> bytes:
    """A profile in which red and green have changed places: littlecms' sRGB with its colorants' names exchanged."""
    data = bytearray(profile_of("sRGB"))
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_icc_profiles_are_converted_on_request(format: str) -> None:
    exact = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(picture(3), format, icc_profile=swapped(), **exact)
    assert np.array_equal(pixels_of(prepare(data, EXACT).data), pixels_of(data))
    converted = prepare(data, ImageOptions(icc="srgb", encode="png"))
    assert converted.changed[-1] == "icc_profile"
    assert np.abs(pixels_of(converted.data).astype(int) - pixels_of(data)[:, :, [1, 0, 2]]).max() <= 2
    plain = encoded(picture(3), format, icc_profile=profile_of("sRGB"), **exact)
    assert "icc_profile" not in prepare(plain, ImageOptions(icc="srgb")).changed
    broken = encoded(picture(3), format, icc_profile=b"not a profile", **exact)
    assert "icc_profile" not in prepare(broken, ImageOptions(icc="srgb")).changed


@pytest.mark.parametrize("format", ["WEBP", "AVIF", "JPEG2000"])
def test_transparent_pictures_are_pillows_to_the_bit(format: str) -> None:
    """The few grey levels that were off came from JPEG, in which lossy images are stored; --encode png is exact."""
    rgba = np.dstack([picture(5, 96, 64), np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))])
    data = encoded(rgba, format)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    assert np.array_equal(decode(data), expected)
    assert np.array_equal(pixels_of(prepare(data, EXACT).data), expected)
    as_jpeg = simplejpeg.encode_jpeg(expected, quality=95, colorsubsampling="420")
    assert np.array_equal(pixels_of(prepare(data, KEEP).data), pixels_of(as_jpeg))


def test_cmyk_is_pillows_to_the_bit() -> None:
    data = encoded(Image.fromarray(picture(6)).convert("CMYK"), "JPEG", quality=90)
    assert np.array_equal(decode(data), pixels_of(data))
    assert np.array_equal(pixels_of(prepare(data, EXACT).data), pixels_of(data))
