"""Pixels are those of Pillow and of the checkpoints' own image processors; hostile images are Damaged, never a
crash."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.support.shards import encode, picture, preprocess
from trainer.data.augment import NUM_DRAWS, augment
from trainer.data.order import uniforms
from trainer.data.patches import native_size
from trainer.data.settings import AugmentSettings
from trainer.data.transforms import Damaged, decode, fit, fitted_size, least_size, resize
from trainer.models.naflex import patch_inputs, unpack

MANY = 10**8
NAFLEX = dataclasses.replace(preprocess(), image_size=(8, (30 + 1) * 8), resize="patches", resample="bilinear")


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with the statistics of a photograph rather than of noise."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(640, 480), (200, 300), (97, 31), (40, 50), (90, 500), (30, 300), (700, 20)])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "nearest"])
def test_resizing_gives_the_pixels_of_pillow(size: tuple[int, int], resample: str) -> None:
    image = smooth(*size)
    ours = resize(np.asarray(image), (64, 48), resample).permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(image.resize((48, 64), Image.Resampling[resample.upper()])).astype(int)
    assert np.abs(ours - theirs).mean() <= 0.01
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("size", [(300, 200), (200, 333), (224, 224), (90, 500), (61, 60)])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_evaluation_equals_the_image_processor_of_hugging_face(kind: str, size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side = 64
    if kind == "clip":
        processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_normalize=False
        )
    else:
        processor = SiglipImageProcessorPil(size={"height": side, "width": side}, do_normalize=False)
    data = encode(smooth(*size), "jpg", quality=95)
    theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0] * 255.0
    ours = fit(decode(data, MANY), preprocess(side, "crop" if kind == "clip" else "squash")).numpy()
    assert ours.shape == theirs.shape == (3, side, side)
    assert np.abs(ours - theirs).mean() <= 0.05
    assert np.abs(ours - theirs).max() <= 3  # libjpeg's and Pillow's decoders round differently


@pytest.mark.parametrize("size", [(300, 200), (61, 60), (17, 900), (1200, 31), (3, 2)])
def test_naflex_equals_the_image_processor_of_hugging_face(size: tuple[int, int]) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    patch, budget = 8, 30
    processor = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=budget, do_normalize=False)
    data = encode(smooth(*size), "png")
    theirs = processor(Image.open(io.BytesIO(data)), return_tensors="pt")
    strips = fit(decode(data, MANY), NAFLEX)[None]
    assert strips.shape[1:] == (3, *NAFLEX.image_size)
    patches, grids = unpack(strips)
    ours = patch_inputs(patches.float(), grids)
    assert grids.tolist() == theirs["spatial_shapes"].tolist()
    assert ours["pixel_attention_mask"].tolist() == theirs["pixel_attention_mask"].tolist()
    difference = (ours["pixel_values"] - 255 * theirs["pixel_values"]).abs()
    assert difference.mean() <= 0.05
    assert difference.max() <= 1.01


def test_naflex_sizes_are_those_of_hugging_face() -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    dice = np.random.default_rng(0)
    for height, width, patch, budget in zip(*dice.integers(1, [[4000], [4000], [33], [1025]], (4, 200)), strict=True):
        shape, sizes = (int(height), int(width)), (int(patch), int(budget))
        assert native_size(shape, *sizes) == get_image_size_for_max_num_patches(*shape, *sizes)


def test_naflex_pictures_are_augmented_before_they_are_cut() -> None:
    image = np.asarray(smooth(90, 60))
    draws = np.full(NUM_DRAWS, 0.5)
    flipped = unpack(augment(image, AugmentSettings(flip=1.0), NAFLEX, draws)[None])
    plain = unpack(fit(np.ascontiguousarray(image[:, ::-1]), NAFLEX)[None])
    assert flipped[1].tolist() == plain[1].tolist()
    assert (flipped[0].int() - plain[0].int()).abs().max() <= 1
    cropped = unpack(
        augment(image, AugmentSettings(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0)), NAFLEX, draws)[None]
    )[1]
    assert cropped.tolist() == plain[1].tolist()  # a crop keeps the image's aspect


@given(width=st.integers(1, 700), height=st.integers(1, 700))
@settings(max_examples=100, deadline=None)
def test_crops_always_cover_the_target(width: int, height: int) -> None:
    prep = preprocess(32, "crop")
    fitted = fitted_size((height, width), prep)
    assert min(fitted) == 32
    assert fit(np.zeros((height, width, 3), np.uint8), prep).shape == (3, 32, 32) if max(width, height) < 200 else True


def test_a_line_of_pixels_costs_no_memory() -> None:
    assert fit(np.full((1, 60_000, 3), 7, np.uint8), preprocess(32, "crop")).unique().tolist() == [7]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_pictures_are_turned_upright(turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(smooth(24, 16), kind, exif=exif, **({"quality": 98, "subsampling": 0} if kind == "jpg" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    ours = decode(data, MANY)
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).max() <= 3


def test_alpha_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode(encode(clear), MANY) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0] * 256)
    assert (decode(encode(palette, transparency=0), MANY) == 255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode(encode(half), MANY)[0, 0].tolist() == [127, 127, 127]


def test_grey_and_16_bit_and_cmyk_become_rgb() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    wide = decode(encode(Image.fromarray(ramp)), MANY)
    assert np.abs(wide[:, :, 0] - ramp / 257).max() <= 0.5 and (wide[:, :, 0] == wide[:, :, 2]).all()
    grey = decode(encode(Image.new("L", (5, 4), 77), "jpg"), MANY)
    assert grey.shape == (4, 5, 3) and (grey == 77).all()
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decode(encode(inks, "jpg"), MANY)[0, 0].astype(int) - [255, 0, 0]).max() <= 3


def test_webp_and_a_jpeg_named_otherwise_are_read_by_their_bytes() -> None:
    assert decode(encode(smooth(9, 7), "webp"), MANY).shape == (7, 9, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds nothing."""
    header, pixels = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")
    chunks = (header, pixels, b"IEND")
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\xd8\xff",
        encode(picture(1, (64, 64)), "jpg")[:-300],
        encode(picture(1, (64, 64)))[:-900],
        png_header(100, 100),
        png_header(0, 5),
        b"GIF89a",
    ],
    ids=["empty", "html", "svg", "soi", "cut jpeg", "cut png", "png header", "no width", "gif"],
)
def test_what_is_not_a_picture_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged, match="not decodable"):
        decode(data, MANY)


def test_float_pictures_are_damaged() -> None:
    buffer = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(buffer, "TIFF")
    with pytest.raises(Damaged, match=r"pixel_format \(floating-point\)"):
        decode(buffer.getvalue(), MANY)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_pictures_are_refused_from_their_header() -> None:
    with pytest.raises(Damaged, match=r"12000 x 12000 pixels are above data.max_pixels"):
        decode(png_header(12_000, 12_000), 10**8)
    with pytest.raises(Damaged, match=r"pixels are above data\.max_pixels"):
        decode(png_header(30_000, 30_000), 10**8)
    with pytest.raises(Damaged, match="64 x 64"):
        decode(encode(picture(1, (64, 64)), "jpg"), 4000)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_never_crash(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["jpg", "png", "webp"]))
    damaged = bytearray(encode(smooth(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]), 10**6)
    except Damaged:
        return
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_scaled_decoding_is_never_below_what_is_needed() -> None:
    data = encode(smooth(1600, 1200), "jpg", quality=90)
    prep = preprocess(64)
    scaled = decode(data, MANY, least_size(2.0, prep))
    assert scaled.shape == (150, 200, 3)
    difference = fit(scaled, prep).int() - fit(decode(data, MANY), prep).int()
    assert 0 < difference.abs().float().mean() < 2
    assert least_size(0.0, prep) == (0, 0)


def changed(
    settings: AugmentSettings, position: int = 11, image: Image.Image | None = None, resize: str = "squash"
) -> torch.Tensor:
    pixels = np.asarray(image or smooth(60, 40))
    return augment(pixels, settings, preprocess(32, resize), uniforms(9, np.array([position]), NUM_DRAWS)[0])


def test_augmentation_off_is_the_evaluation_picture() -> None:
    assert torch.equal(changed(AugmentSettings()), fit(np.asarray(smooth(60, 40)), preprocess(32)))


def test_flips_happen_as_often_as_asked() -> None:
    plain = changed(AugmentSettings())
    flips = [torch.equal(changed(AugmentSettings(flip=0.25), position), plain.flip(2)) for position in range(400)]
    assert 70 <= sum(flips) <= 130  # 100 expected, 3.5 standard deviations
    assert torch.equal(changed(AugmentSettings(flip=1.0)), plain.flip(2))


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_crops_stay_inside_and_have_the_area_asked_for(resize: str) -> None:
    rows, columns = np.mgrid[0:200, 0:250]
    ramp = Image.fromarray(np.stack([rows, columns, 0 * rows], 2).astype(np.uint8))  # a pixel says where it comes from
    settings = AugmentSettings(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    tops = set()
    for position in range(40):
        part = changed(settings, position, ramp, resize).numpy().astype(int)
        height, width = (int(np.ptp(part[axis])) * 33 / 32 for axis in (0, 1))
        assert height * width == pytest.approx(0.25 * 200 * 250, rel=0.12)
        tops.add(int(part[0].min()))
    assert len(tops) > 20


def test_colour_operations_are_light_and_varied() -> None:
    plain = changed(AugmentSettings()).int()
    settings = AugmentSettings(randaugment=2, magnitude=0.3)
    results = [changed(settings, position) for position in range(60)]
    assert len({result.numpy().tobytes() for result in results}) > 45
    assert all((result.int() - plain).abs().float().mean() < 80 for result in results)
    assert torch.equal(changed(settings, 5), changed(settings, 5))
