"""The demo pairs: real names, a split without leaks, twins named."""

import csv
import io
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from data_tools.commands import glyphs
from data_tools.commands.glyphs import FACES, Glyph
from data_tools.io.errors import UserError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs")
    few = {font: [code for code in range(0x21, 0x2200) if unicodedata.name(chr(code), None)] for font in FACES}
    with pytest.MonkeyPatch.context() as patch:
        real = glyphs.characters
        patch.setattr(glyphs, "characters", lambda font: [code for code in real(font) if code in few[font]][:300])
        glyphs.write(out, size=32, processes=2)
    return out


def rows(pairs: Path, part: str) -> list[dict[str, str]]:
    with (pairs / f"{part}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_caption_is_the_unicode_name_and_the_face() -> None:
    row = Glyph("DejaVuSerif-Bold", 0x03AC).row(["DejaVuSerif-Bold"])
    assert row[1] == "greek small letter alpha with tonos, bold serif"


def test_every_face_is_there_and_no_two_share_a_phrase() -> None:
    assert len(set(FACES.values())) == len(FACES) == 17
    assert all(glyphs.font_file(font).is_file() for font in FACES)


def test_held_out_pairs_are_new_but_their_parts_are_trained(pairs: Path) -> None:
    train = rows(pairs, "train")
    seen_pairs, seen_characters = {row["caption"] for row in train}, {row["character"] for row in train}
    seen_faces = {row["face"] for row in train}
    for part in ("validation", "test"):
        held_out = rows(pairs, part)
        assert held_out
        for row in held_out:
            assert row["caption"] not in seen_pairs
            assert row["character"] in seen_characters
            assert row["face"] in seen_faces


def test_every_picture_has_ink_and_the_stated_size(pairs: Path) -> None:
    for row in rows(pairs, "test"):
        with Image.open(pairs / row["image"]) as image:
            assert image.size == (32, 32)
            assert image.getextrema()[0] < 200


def test_faces_lists_exactly_the_faces_with_the_same_picture(pairs: Path) -> None:
    every = [row for part in ("train", "validation", "test") for row in rows(pairs, part)]
    pixels = {row["image"]: Image.open(pairs / row["image"]).tobytes() for row in every}
    for row in every:
        same = {
            o["face"]
            for o in every
            if o["character"] == row["character"] and pixels[o["image"]] == pixels[row["image"]]
        }
        assert set(row["faces"].split("|")) == same
    assert any("|" in row["faces"] for row in every)


def test_a_comma_lies_lower_than_an_apostrophe() -> None:
    ink = {}
    for glyph, png in glyphs.render("DejaVuSans", 32):
        if glyph.code in (ord(","), ord("'")):
            ink[chr(glyph.code)] = Image.eval(Image.open(io.BytesIO(png)), lambda value: 255 - value).getbbox()
    assert ink[","] is not None
    assert ink["'"] is not None
    assert ink[","][1] > ink["'"][3]


def test_a_second_call_changes_nothing(pairs: Path) -> None:
    before = (pairs / "train.csv").stat().st_mtime_ns
    assert glyphs.main([str(pairs)]) == 0
    assert (pairs / "train.csv").stat().st_mtime_ns == before


def test_an_unusable_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size: '4' is not a whole number from 16 to 512"):
        glyphs.main([str(tmp_path), "--size", "4"])
