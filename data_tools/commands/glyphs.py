"""Demo pairs without a download: the characters of the fonts that ship with matplotlib, captioned with their Unicode
names.

    python -m data_tools glyphs demo/pairs

writes ``train.csv``, ``validation.csv``, ``test.csv`` (columns image, caption, character, face, faces, code) and one
grey PNG per glyph, about 54,000 in 17 faces: "greek small letter alpha with tonos, bold serif". The split is by
(character, face): a held-out combination is never trained on, but its character is, in another face, and its face is,
with other characters. A second run finds the files and does nothing.

Two images in five are identical in several faces (an arrow has no oblique): ``faces`` lists all of these, separated
by "|", because no model can tell which of them an image was rendered from.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.commands.arguments import Parser, add_processes, whole
from data_tools.io.files import write_atomic
from data_tools.io.output import refuse_file
from data_tools.io.workers import run_workers

# Faces with a Unicode character map and more than a handful of characters; matplotlib's other fonts are TeX encodings
# and pieces of tall brackets. The phrase is what names the face in a caption: each face has its own.
FACES = {
    "DejaVuSans": "sans",
    "DejaVuSans-Bold": "bold sans",
    "DejaVuSans-Oblique": "oblique sans",
    "DejaVuSans-BoldOblique": "bold oblique sans",
    "DejaVuSansMono": "mono",
    "DejaVuSansMono-Bold": "bold mono",
    "DejaVuSansMono-Oblique": "oblique mono",
    "DejaVuSansMono-BoldOblique": "bold oblique mono",
    "DejaVuSerif": "serif",
    "DejaVuSerif-Bold": "bold serif",
    "DejaVuSerif-Italic": "italic serif",
    "DejaVuSerif-BoldItalic": "bold italic serif",
    "STIXGeneral": "times",
    "STIXGeneralBol": "bold times",
    "STIXGeneralItalic": "italic times",
    "STIXGeneralBolIta": "bold italic times",
    "DejaVuSansDisplay": "display sans",
}
COLUMNS = ("image", "caption", "character", "face", "faces", "code")
HELD_OUT = {"test": 0.04, "validation": 0.02}
"""Share of the pairs whose character is also trained in another face."""


@dataclass(frozen=True)
class Glyph:
    """One (character, face) pair."""

    font: str
    code: int

    @property
    def character(self) -> str:
        return unicodedata.name(chr(self.code)).lower()

    @property
    def image(self) -> str:
        return f"{self.font}/{self.code:05x}.png"

    def row(self, twins: list[str]) -> tuple[str, ...]:
        """A line of the CSV file; ``twins`` are the fonts that draw this character identically, including this one."""
        face = FACES[self.font]
        faces = "|".join(FACES[font] for font in twins)
        return (self.image, f"{self.character}, {face}", self.character, face, faces, f"U+{self.code:04X}")


def font_file(font: str) -> Path:
    """The path of a face in matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def characters(font: str) -> list[int]:
    """Code points of a face that have a Unicode name, ascending."""
    from matplotlib.ft2font import FT2Font

    return sorted(code for code in FT2Font(str(font_file(font))).get_charmap() if unicodedata.name(chr(code), None))


def render(font: str, size: int) -> Iterator[tuple[Glyph, bytes]]:
    """(glyph, PNG bytes) for every character of a face that has visible pixels. All share one baseline, so that a comma
    differs from an apostrophe."""
    from PIL import Image, ImageDraw, ImageFont

    em = round(size * 0.72)
    baseline = round(size * 0.74)
    face = ImageFont.truetype(str(font_file(font)), em, layout_engine=ImageFont.Layout.BASIC)
    for code in characters(font):
        text = chr(code)
        left, top, right, bottom = face.getbbox(text, anchor="ls")
        if right <= left or bottom <= top:
            continue
        canvas = Image.new("L", (size, size), 255)
        width, height = right - left, bottom - top
        if width <= size and height <= size:
            # Shifted only as far as needed to fit the image.
            y = min(max(baseline, -top), size - bottom)
            ImageDraw.Draw(canvas).text(((size - width) // 2 - left, y), text, font=face, fill=0, anchor="ls")
        else:
            large = Image.new("L", (int(width), int(height)), 255)
            ImageDraw.Draw(large).text((-left, -top), text, font=face, fill=0, anchor="ls")
            large.thumbnail((size, size), Image.Resampling.LANCZOS)
            canvas.paste(large, ((size - large.width) // 2, (size - large.height) // 2))
        if canvas.getextrema()[0] == 255:
            continue
        data = io.BytesIO()
        canvas.save(data, "PNG", compress_level=6)
        yield Glyph(font, code), data.getvalue()


def split(glyphs: list[Glyph]) -> dict[str, list[Glyph]]:
    """train, validation and test, fixed by a hash of each pair. One face of every character is always trained."""
    parts: dict[str, list[Glyph]] = {"train": [], "validation": [], "test": []}
    of_character: dict[int, list[Glyph]] = defaultdict(list)
    for glyph in glyphs:
        of_character[glyph.code].append(glyph)
    for faces in of_character.values():
        first, *others = sorted(faces, key=_draw)
        parts["train"].append(first)
        for glyph in others:
            # Independent of the hash that ordered the faces.
            chance = _draw(glyph, salt="part")
            part = "test" if chance < HELD_OUT["test"] else "validation" if chance < sum(HELD_OUT.values()) else "train"
            parts[part].append(glyph)
    return {part: sorted(members, key=_draw) for part, members in parts.items()}


def _draw(glyph: Glyph, salt: str = "order") -> float:
    digest = hashlib.blake2b(f"{salt} {glyph.image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def write_face(font: str, out: Path, size: int) -> dict[Glyph, bytes]:
    """Renders one face into ``out/FONT/``; returns its glyphs with a digest of each image."""
    folder = out / font
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for glyph, png in render(font, size):
        (out / glyph.image).write_bytes(png)
        digests[glyph] = hashlib.blake2b(png, digest_size=16).digest()
    return digests


def write(out: Path, size: int, processes: int) -> dict[str, int]:
    """Renders all faces and writes the three CSV files, ``train.csv`` last; returns the number of pairs in each."""
    out.mkdir(parents=True, exist_ok=True)
    faces = run_workers(lambda face, _: write_face(face, out, size), list(FACES), processes)
    digests = {glyph: digest for face in faces for glyph, digest in face.items()}
    twins: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for glyph, digest in digests.items():
        twins[glyph.code, digest].append(glyph.font)
    parts = split(list(digests))
    for part in ("test", "validation", "train"):
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(COLUMNS)
        table.writerows(glyph.row(twins[glyph.code, digests[glyph]]) for glyph in parts[part])
        write_atomic(out / f"{part}.csv", text.getvalue())
    return {part: len(members) for part, members in parts.items()}


def main(argv: list[str]) -> int:
    parser = Parser("glyphs", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the CSV files and the PNGs")
    parser.add_argument("--size", type=whole(16, 512), default=32, help="side of an image in pixels (default 32)")
    add_processes(parser)
    options = parser.parse_args(argv)
    refuse_file(options.out)
    if (options.out / "train.csv").exists():
        print(
            f"{options.out / 'train.csv'} is there already: nothing to do (remove the folder to render again)",
            file=sys.stderr,
        )
        return 0
    counts = write(options.out, options.size, options.processes)
    print(
        f"{sum(counts.values()):,} glyphs in {len(FACES)} faces -> {options.out}: "
        + ", ".join(f"{n:,} {part}" for part, n in counts.items())
    )
    return 0
