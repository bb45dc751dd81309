"""Images and pair lists for tests of data_tools: small, seeded, and damaged on purpose."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_tools.__main__ import main as data_tools
from data_tools.samples.images import ImageOptions, prepare
from data_tools.samples.reject import Reject

KEEP = ImageOptions()


def picture(seed: int, width: int = 48, height: int = 40) -> NDArray[np.uint8]:
    """A smooth RGB image [height, width, 3] that JPEG keeps nearly as it is."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: NDArray[Any] | Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    """Pixels as a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    """A file's RGB pixels [height, width, 3], by Pillow alone."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data: bytes, options: ImageOptions = KEEP) -> str:
    """Why ``prepare`` rejects a file."""
    with pytest.raises(Reject) as caught:
        prepare(data, options)
    return caught.value.reason


def write_pairs(folder: Path, count: int, format: str = "JPEG") -> Path:
    """``count`` images and pairs.csv (image, caption, number); returns the CSV file."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "number"])
        for number in range(count):
            name = f"{number}.{format.lower()}"
            (folder / name).write_bytes(encoded(picture(number), format))
            writer.writerow([name, f"image number {number}, drawn", number])
    return table


COLUMNS = ("--image", "image", "--caption", "caption")


def shard(pairs: Path | str, out: Path | str, *options: str, columns: tuple[str, ...] = COLUMNS) -> int:
    """``python -m data_tools shard`` in this process."""
    return data_tools(["shard", str(pairs), str(out), *columns, "--quiet", *options])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rejects(out: Path) -> dict[str, str]:
    """Source -> reason, of everything that was left out."""
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    return {line["source"]: line["reason"] for line in lines}
