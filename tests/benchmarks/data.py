"""The loader against plain webdataset + Pillow on the same shards, two workers each, and where the loader's time goes.

    python -m tests.benchmarks.data                       # the table, in Markdown; about a minute on two idle cores
    python -m tests.benchmarks.data --images 4000 --rounds 5 --workers 2

Images are synthetic JPEGs of about 69 KB (512 x 384), batches are 64 pairs at 224 x 224 with 64 tokens. Rounds of the
contenders take turns and medians are compared, so that a busy machine slows all alike: read the ratios, not the rates.
Where others use the same cores the ratio of processor time says more than that of time on the clock; on an idle machine
the two agree.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import trainer.data.reader as reader_module
from data_tools.format.index import FORMAT, MANIFEST, VERSION, Dataset
from tests.support.shards import write_shards
from trainer.core.types import Preprocess
from trainer.data import DataSettings, SourceSettings, build_loader
from trainer.data.open import open_source
from trainer.data.order import FullOrder
from trainer.data.reader import Reader, Rows

BATCH, SIDE, NUM_TOKENS = 64, 224, 64
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "old",
    "new",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "under",
    "over",
    "beside",
    "with",
    "small",
    "large",
    "bright",
    "dark",
]
MEAN = STD = (0.5, 0.5, 0.5)
BILLION = 1_000_000_000


@functools.cache
def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: number + 1 for number, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_padding(length=NUM_TOKENS)
    words.enable_truncation(NUM_TOKENS)
    return words


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = tokenizer().encode_batch_fast(captions)
    return torch.tensor([one.ids for one in encoded]), torch.tensor(
        [one.attention_mask for one in encoded], dtype=torch.bool
    )


def preprocess(side: int) -> Preprocess:
    return Preprocess((side, side), "squash", "bicubic", MEAN, STD, NUM_TOKENS, tokenize)


@functools.cache
def photo(number: int) -> bytes:
    """A JPEG with shapes of all sizes and a little grain: 69 KB like a photograph of its size."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((384, 512, 3), np.float32)
    for cells, strength in ((4, 60), (16, 35), (64, 20)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC), np.float32) - 128) * (strength / 64)
    pixels += 128 + rng.normal(0, 8.5, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photo_sample(number: int) -> dict[str, bytes]:
    words = np.random.default_rng(number).choice(WORDS, 12)
    return {"jpg": photo(number % 200), "txt": " ".join(words).encode(), "json": b"{}"}


def glyph_sample(number: int) -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number % 500).integers(0, 2, (32, 32), dtype=np.uint8) * 255).save(
        buffer, "PNG"
    )
    return {"png": buffer.getvalue(), "txt": f"a photo of the {WORDS[number % len(WORDS)]}".encode()}


def ours(folder: Path, workers: int, side: int = SIDE) -> Iterator[int]:
    with build_loader(
        DataSettings(train=str(folder), workers=workers, cache_decoded=0), preprocess(side), BATCH, 0, 1, 0, 0
    ) as loader:
        for batch in loader:
            yield batch.rows


def to_float(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    return torch.from_numpy((pixels - MEAN[0]) / STD[0]).permute(2, 0, 1)


def to_uint8(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def peer(folder: Path, workers: int, transform: Callable[[Image.Image], torch.Tensor]) -> Iterator[int]:
    """The pipeline of webdataset's own documentation: PIL images, a transform, a caption tokenized, batches by the
    workers."""
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
    )
    dataset = dataset.map_tuple(transform, lambda caption: tokenize([caption])[0][0]).batched(BATCH, partial=False)
    for pixels, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(pixels)


class Rate(NamedTuple):
    """Pairs a second of time on the clock, and of processor time over all processes."""

    clock: float
    processor: float


def processor_seconds() -> float:
    """Processor time of this process and its children so far."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children()))


def rate(contender: Iterator[int], images: int) -> Rate:
    """After the first batches, with what workers made ahead used up or in the making alike at both ends."""
    for _ in range(8):
        next(contender)
    began, spent, done = time.perf_counter(), processor_seconds(), 0
    while done < images:
        done += next(contender)
    return Rate(done / (time.perf_counter() - began), done / (processor_seconds() - spent))


def race(folder: Path, images: int, rounds: int, workers: int) -> dict[str, Rate]:
    """Median rates of each contender over rounds in which they take turns."""
    contenders: dict[str, Callable[[], Iterator[int]]] = {
        "webdataset + Pillow, float32": lambda: peer(folder, workers, to_float),
        "webdataset + Pillow, uint8": lambda: peer(folder, workers, to_uint8),
        "RingLIP, uint8": lambda: ours(folder, workers),
    }
    rates: dict[str, list[Rate]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, start in contenders.items():
            contender = start()
            rates[name].append(rate(contender, images))
            del contender
    return {
        name: Rate(*(statistics.median(column) for column in zip(*found, strict=True))) for name, found in rates.items()
    }


def shares(folder: Path, images: int) -> dict[str, float]:
    """Parts of one process's time in filling rows, by what it did."""
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            began = time.thread_time()  # what other processes take of the core is not counted
            try:
                return work(*args)
            finally:
                spent[name] = spent.get(name, 0.0) + time.thread_time() - began

        return wrapper

    settings = DataSettings(train=str(folder))
    reader = Reader([open_source(SourceSettings(path=str(folder)), settings)], settings, preprocess(SIDE), 0)
    rows = Rows(*(np.zeros(shape, dtype) for shape, dtype in Rows.shapes(64, reader.preprocess)))
    reader.fill(np.arange(64), rows)
    kept = reader_module.decode, reader_module.fit
    try:
        reader_module.decode, reader_module.fit = timed("decode", kept[0]), timed("resize", kept[1])
        reader.sources[0].read = timed("read and check digest", reader.sources[0].read)  # type: ignore[method-assign]
        reader.write_text = timed("tokenize and hash", reader.write_text)  # type: ignore[method-assign]
        reader.order = timed("order", reader.order)  # type: ignore[assignment]
        began = time.thread_time()
        for start in range(64, images, 64):
            reader.fill(np.arange(start, start + 64), rows)
        total = time.thread_time() - began
    finally:
        reader_module.decode, reader_module.fit = kept
    spent["everything else"] = total - sum(spent.values())
    return {name: part / total for name, part in sorted(spent.items(), key=lambda item: -item[1])}


def cached_cost(folder: Path) -> tuple[float, float]:
    """Process milliseconds a pair of a small set, in the first epoch (decoded) and later (gathered)."""
    with build_loader(DataSettings(train=str(folder)), preprocess(32), BATCH, 0, 1, 0, 0) as loader:
        costs = []
        for batches in (128, 1600):
            began = time.process_time()
            for _ in range(batches):
                next(loader)
            costs.append((time.process_time() - began) / (batches * BATCH) * 1000)
    return costs[0], costs[1]


def resume_seconds(folder: Path) -> float:
    """Opening a dataset of a billion samples in 100,000 (artificial) shards and finding the next batch in the midst of
    its third epoch."""
    shards = [
        {"name": f"{number:06d}.tar", "samples": 10_000, "bytes": 1, "digest": "0" * 32}
        for number in range(BILLION // 10_000)
    ]
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "version": VERSION, "shards": shards}))
    began = time.perf_counter()
    dataset = Dataset.open(folder)
    first = 2 * BILLION + 123_456_789
    _, samples = FullOrder([dataset.num_samples], [dataset.num_samples], 1)(np.arange(first, first + 4096))
    dataset.locate(samples)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="The loader against webdataset + Pillow")
    parser.add_argument("--images", type=int, default=1536, help="pairs timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_shards(Path(temporary) / "photos", [250] * 8, make=photo_sample)
        glyphs = write_shards(Path(temporary) / "glyphs", [2048] * 4, make=glyph_sample)
        size = statistics.mean(len(photo(number)) for number in range(200)) / 1000
        rates = race(folder, options.images, options.rounds, options.workers)
        first, later = cached_cost(glyphs)
        slowest = next(iter(rates.values()))
        title = f"loader, {options.workers} workers, JPEGs of {size:.0f} KB to {SIDE} x {SIDE}"
        print(f"| {title} | pairs/s | ratio | pairs per processor second | ratio |\n|---|---|---|---|---|")
        for name, found in rates.items():
            clock, processor = found.clock / slowest.clock, found.processor / slowest.processor
            print(f"| {name} | {found.clock:,.0f} | {clock:.2f} | {found.processor:,.0f} | {processor:.2f} |")
        parts = shares(folder, 640)
        print(f"\nWhere RingLIP's time goes: {', '.join(f'{name} {part:.1%}' for name, part in parts.items())}; ")
        print(f"decode and resize together {parts['decode'] + parts['resize']:.1%}.")
        print(
            f"\n32 x 32 PNGs kept decoded: {first:.3f} ms a pair in the first epoch, {later:.4f} ms later (limit 0.05)."
        )
        resumed = resume_seconds(Path(temporary) / "billion")
        print(f"A billion samples in 100,000 shards, opened and entered in the third epoch: {resumed * 1000:.0f} ms.")


if __name__ == "__main__":
    main()
