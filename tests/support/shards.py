"""Tiny shards written by hand, a word-counting Preprocess, and loaders on them: what the loader's tests share.

write_shards(folder, [5, 7])                      # 00000.tar with 5 samples, 00001.tar with 7, index and manifest
take(loader("train", folder), 3)                  # the first three batches
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_tools.format.index import FORMAT, VERSION
from data_tools.format.scan import scan_tar
from trainer.core.types import Batch, Preprocess
from trainer.data import DataSettings, Loader, build_loader

SIZE = 8
NUM_TOKENS = 6


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a word: stable, and different for different words."""
    tokens = torch.zeros(len(captions), NUM_TOKENS, dtype=torch.int64)
    for row, caption in enumerate(captions):
        words = [1 + zlib.crc32(word.encode()) % 30_000 for word in caption.split()][:NUM_TOKENS]
        tokens[row, : len(words)] = torch.tensor(words, dtype=torch.int64)
    return tokens, tokens > 0


def preprocess(size: int = SIZE, resize: Any = "squash", resample: Any = "bicubic") -> Preprocess:
    return Preprocess((size, size), resize, resample, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), NUM_TOKENS, tokenize)


def picture(number: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """An image that no other number gives, of (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = (number >> 16, number >> 8 & 255, number & 255)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind], **options)
    return buffer.getvalue()


Members = dict[str, bytes]


def sample(number: int) -> Members:
    """The members of one sample, by extension."""
    metadata = {
        "number": number,
        "captions": [f"caption {number}", f"other words for {number}"],
        "title": f"title {number}",
    }
    return {"png": encode(picture(number)), "txt": f"caption {number}".encode(), "json": json.dumps(metadata).encode()}


def write_tar(path: Path, samples: dict[str, Members]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_shards(
    folder: Path,
    counts: list[int],
    first: int = 0,
    make: Callable[[int], Members] = sample,
    captions: int = 1,
    index: bool = True,
) -> Path:
    """Shards of ``counts`` samples numbered from ``first``; ``captions`` is what the manifest says of several per
    sample."""
    folder.mkdir(parents=True)
    number, entries = first, []
    for shard, count in enumerate(counts):
        tar = folder / f"{shard:05d}.tar"
        write_tar(tar, {f"{i:06d}": make(i) for i in range(number, number + count)})
        entries.append({"name": tar.name, "samples": count, "bytes": tar.stat().st_size})
        number += count
        if index:
            np.save(folder / f"{shard:05d}.npy", scan_tar(tar)[0])
            (folder / f"{shard:05d}.npy").rename(folder / f"{shard:05d}.idx")
    if index:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "shards": entries,
            "samples": sum(counts),
            "max_captions": captions,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def overwrite(folder: Path, shard: int, row: int, data: bytes = b"damage", skip: int = 40) -> None:
    """Writes over the image of one sample, ``skip`` bytes into it."""
    rows = np.load(folder / f"{shard:05d}.idx")
    with open(folder / f"{shard:05d}.tar", "r+b") as tar:
        tar.seek(int(rows[row]["image_offset"]) + skip)
        tar.write(data)


def loader(
    train: Any,
    batch: int = 12,
    rank: int = 0,
    world: int = 1,
    seed: int = 5,
    seen: int = 0,
    prep: Preprocess | None = None,
    **settings: Any,
) -> Loader:
    settings = {"workers": 0, **settings}
    train = str(train) if isinstance(train, Path) else train
    return build_loader(DataSettings(train=train, **settings), prep or preprocess(), batch, rank, world, seed, seen)


def take(source: Loader, count: int) -> list[Batch]:
    """The first batches, and the loader closed."""
    with source:
        return [next(source) for _ in range(count)]


def global_batches(train: Any, count: int, world: int, batch: int = 12, **settings: Any) -> list[Batch]:
    """What all ranks read, put together: ``count`` global batches."""
    ranks = [take(loader(train, batch=batch, rank=rank, world=world, **settings), count) for rank in range(world)]
    return [Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )
