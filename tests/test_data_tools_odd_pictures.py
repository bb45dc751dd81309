"""The thousand odd images of Pillow's tests against Pillow's own pixels, and a fuzzer that starts from them.

    python -m pytest tests/test_data_tools_odd_pictures.py -m slow                 # some minutes; fetches Pillow's sources
    python -m tests.test_data_tools_odd_pictures                                   # writes the table of outcomes anew

tests/data/odd_pictures.tsv holds the outcome of every image, so that a change shows.
"""

from __future__ import annotations

import io
import os
import random
import resource
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_tools.samples import sandbox
from data_tools.samples.decoding import decode
from data_tools.samples.formats import ON_REQUEST
from data_tools.samples.image_header import Limits, read_header
from data_tools.samples.images import ImageOptions, prepare
from data_tools.samples.reject import REASONS, Reject
from tests.support.odd_pictures import odd_pictures

TABLE = Path(__file__).parent / "data/odd_pictures.tsv"
OPTIONS = ImageOptions(min_side=1, max_aspect=10_000, formats=ON_REQUEST)
"""All formats, so that the decoders of rare ones are tested too; other rejections are by size only."""
MUTATIONS, SECONDS, MEMORY = 1000, 5.0, 1.5 * 2**30


@pytest.fixture(scope="module")
def folder() -> Path:
    found = odd_pictures()
    if found is None:
        pytest.skip("no package index: Pillow's source distribution cannot be fetched")
    return found


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def outcome(data: bytes) -> str:
    try:
        prepared = prepare(data, OPTIONS)
    except Reject as reject:
        return f"rejected\t{reject.reason}"
    return f"{prepared.width}x{prepared.height} {prepared.extension}\t{','.join(prepared.changed)}"


def outcomes(folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)}\t{outcome(path.read_bytes())}" for path in pictures(folder)]


def pillows_pixels(data: bytes) -> NDArray[np.uint8]:
    """The first image as Pillow gives it: turned, on white, 8-bit RGB."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off at 255
        wide = np.asarray(image)
        grey = np.where(wide == image.info.get("transparency", -1), 255, np.rint(wide / 257))
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return np.asarray(image.convert("RGB"))


@pytest.mark.slow
def test_every_outcome_is_that_of_the_table(folder: Path) -> None:
    found, expected = outcomes(folder), TABLE.read_text().splitlines()
    assert found == expected, "\n".join(sorted(set(found) ^ set(expected)))
    assert all(line.split("\t")[2] in REASONS for line in found if "\trejected\t" in line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_accepted_pictures_have_pillows_pixels(folder: Path) -> None:
    compared = 0
    wrong = []
    for path in pictures(folder):
        data = path.read_bytes()
        try:
            ours = decode(data, Limits(formats=ON_REQUEST))
        except Reject:
            continue
        theirs = pillows_pixels(data)
        header = read_header(data, Limits(formats=ON_REQUEST))
        compared += 1
        if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
            off = int(np.abs(ours.astype(int) - theirs).max()) if ours.shape == theirs.shape else -1
            wrong.append((path.name, off, header.changes))
        if (header.height, header.width) != ours.shape[:2]:
            wrong.append((path.name, -2, header.changes))
    assert not wrong, "\n".join(map(str, wrong))
    assert compared > 800


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, most often in the header; a piece cut out, repeated or dropped at the end; sizes made large."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        reach = len(result) if rng.random() < 0.4 else min(len(result), 256)
        at, kind = rng.randrange(max(1, reach)), rng.random()
        if kind < 0.6:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif kind < 0.8:
            result[at : at + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\x00\x00\x27\x10", b"\x10\x27\x00\x00", b"\0\0\0\0"]
            )
        elif kind < 0.9:
            del result[at : at + rng.randint(1, 64)]
        else:
            result[at:at] = result[at : at + rng.randint(1, 64)]
    if result[:4] == b"\x89PNG" and rng.random() < 0.7:
        mend_checksums(result)
    return bytes(result[: rng.randrange(1, len(result) + 1)] if rng.random() < 0.15 and result else result)


def mend_checksums(png: bytearray) -> None:
    """So that the decoder sees the mutated chunks."""
    at = 8
    while at + 12 <= len(png) and at + 12 + (length := int.from_bytes(png[at : at + 4], "big")) <= len(png):
        png[at + 8 + length : at + 12 + length] = zlib.crc32(png[at + 4 : at + 8 + length]).to_bytes(4, "big")
        at += 12 + length


def peak_memory() -> float:
    """Bytes that this process and the sandbox have held at most."""
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    process = sandbox._SANDBOX.process
    if process is None or process.poll() is not None:
        return here
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return max(here, *(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_pictures_end_in_a_named_outcome_within_limits(folder: Path) -> None:
    rng = random.Random(int(os.environ.get("PICTURE_SEED", "0")))
    collection = [path for path in pictures(folder) if 0 < path.stat().st_size < 4 << 20]
    slowest: tuple[float, str] = (0, "")
    largest: tuple[float, str] = (0, "")
    reasons: dict[str, int] = {}
    crashed = []
    for number in range(MUTATIONS):
        path = rng.choice(collection)
        data = mutated(path.read_bytes(), rng)
        started = time.perf_counter()
        found = outcome(data)
        slowest = max(slowest, (time.perf_counter() - started, f"{number} {path.name} {found!r}"))
        largest = max(largest, (peak_memory(), f"{number} {path.name} {found!r}"))
        reason = found.split("\t")[1] if found.startswith("rejected") else "accepted"
        if reason == "decoder_crashed":
            crashed.append(f"{number} {path.name}")
        reasons[reason] = reasons.get(reason, 0) + 1
    print(f"slowest {slowest}, largest {largest[0] / 2**20:.0f} MiB {largest[1]}, outcomes {reasons}")
    assert slowest[0] < SECONDS and largest[0] < MEMORY and sum(reasons.values()) == MUTATIONS
    assert not crashed, crashed


if __name__ == "__main__":
    place = odd_pictures()
    if place is not None:
        TABLE.write_text("\n".join(outcomes(place)) + "\n")
