"""Describes a dataset: sizes, shapes, captions, languages, duplicates, and a contact sheet.

    python -m data_tools stats DATASET                   # writes DATASET/stats.json and DATASET/stats.html
    python -m data_tools stats DATASET --out REPORT      # to another folder
    python -m data_tools stats DATASET --captions 0      # reads every caption, not a random 50,000
    python -m data_tools stats DATASET --tokenizer openai/clip-vit-base-patch32 --num-tokens 77    # truncated captions

Sizes in pixels and bytes, formats and exact duplicates cover all samples (they are in the index); figures on captions
cover a random subset.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.commands.arguments import Parser, add_processes, whole
from data_tools.format.index import Dataset
from data_tools.format.map_shards import TarReader, open_local, over_shards
from data_tools.io.errors import UserError
from data_tools.io.files import write_atomic
from data_tools.io.output import make_folder
from data_tools.io.permutation import Permutation
from data_tools.samples.languages import guess_language
from data_tools.samples.page import Picture, render

_WORD = re.compile(r"[^\W_]+")
_FORMATS = {0: "other", 1: "jpg", 2: "png", 3: "webp"}
_QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)


def describe_numbers(values: NDArray[Any]) -> dict[str, Any]:
    """Mean, quantiles and a histogram (at most 40 bins, logarithmic where values span more than a factor of 50)."""
    values = np.asarray(values, np.float64)
    if not values.size:
        return {"count": 0}
    low, high = float(values.min()), float(values.max())
    if high > 50 * max(low, 1) and low >= 0:
        edges = np.unique(np.geomspace(max(low, 1), high, 41))
        edges[0], edges[-1] = low, high  # rounding must not exclude the extremes
    elif high > low:
        whole = bool(np.all(values == np.round(values)))
        step = max(1.0, np.ceil((high - low + 1) / 40)) if whole else (high - low) / 40
        edges = np.arange(low, high + step * 1.5, step)
    else:
        edges = np.array([low, low + 1])
    counts, _ = np.histogram(values, edges)
    quantiles = dict(
        zip([f"{share:g}" for share in _QUANTILES], np.quantile(values, _QUANTILES).round(3).tolist(), strict=True)
    )
    return {
        "count": int(values.size),
        "mean": round(float(values.mean()), 3),
        "quantiles": quantiles,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


class _Captions:
    """Figures on the captions of one shard."""

    def __init__(self) -> None:
        self.characters: list[int] = []
        self.words: list[int] = []
        self.vocabulary: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.tokens: list[int] = []

    def add(self, text: str) -> None:
        words = _WORD.findall(text.lower())
        self.characters.append(len(text))
        self.words.append(len(words))
        self.vocabulary.update(words)
        self.languages[guess_language(text)] += 1
        self.texts[text] += 1


def _read_captions(dataset: Dataset, chosen: list[NDArray[np.int64]], tokenizer: str | None, shard: int) -> _Captions:
    found = _Captions()
    rows = dataset.shard(shard)
    with TarReader(dataset.tar_path(shard)) as tar:
        texts = [tar.read(rows[row], "text").decode("utf-8", "replace") for row in chosen[shard].tolist()]
    for text in texts:
        found.add(text)
    if tokenizer is not None:
        found.tokens = [len(one.ids) for one in read_tokenizer(tokenizer).encode_batch_fast(texts)]
    return found


def read_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer, by directory, tokenizer.json or name on the hub; it cuts and pads nothing."""
    from tokenizers import Tokenizer

    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises a bare Exception for whatever is wrong
        raise UserError(f"--tokenizer {name}: not readable as a tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def choose(dataset: Dataset, count: int) -> list[NDArray[np.int64]]:
    """``count`` samples (all if 0) drawn with a fixed seed: the row numbers for each shard."""
    total = dataset.num_samples
    samples = np.sort(Permutation(total, key=0)(np.arange(min(count, total) if count else total)))
    shards, rows = dataset.locate(samples)
    return [rows[shards == shard] for shard in range(dataset.num_shards)]


def _tokens(lengths: list[int], context: int) -> dict[str, Any]:
    """How long captions are in tokens, and how many a model with so many would cut."""
    cut = sum(length > context for length in lengths) / max(1, len(lengths))
    return {"tokens": describe_numbers(np.array(lengths)), "num_tokens": context, "cut": round(cut, 6)}


def collect(
    dataset: Dataset, num_captions: int, processes: int, tokenizer: str | None = None, context: int = 77
) -> dict[str, Any]:
    """All figures, as JSON values; with a ``tokenizer`` also how many captions a model that reads ``context`` tokens
    would cut."""
    rows = [dataset.shard(shard) for shard in range(dataset.num_shards)]
    fields = {
        name: np.concatenate([part[name] for part in rows])
        for name in ("width", "height", "image_size", "image_format", "digest")
    }
    known = (fields["width"] > 0) & (fields["height"] > 0)
    width, height = fields["width"][known].astype(np.int64), fields["height"][known].astype(np.int64)
    _, copies = np.unique(fields["digest"], return_counts=True)
    formats = Counter(_FORMATS[value] for value in fields["image_format"].tolist())
    work = partial(_read_captions, dataset, choose(dataset, num_captions), tokenizer)
    captions = _Captions()
    for part in over_shards(work, dataset.num_shards, processes):
        captions.characters += part.characters
        captions.words += part.words
        captions.vocabulary += part.vocabulary
        captions.languages += part.languages
        captions.texts += part.texts
        captions.tokens += part.tokens
    repeated = [(text, count) for text, count in captions.texts.most_common(20) if count > 1]
    return {
        "samples": dataset.num_samples,
        "shards": dataset.num_shards,
        "bytes": sum(int(entry["bytes"]) for entry in dataset.manifest["shards"]),
        "rejected": dataset.manifest.get("rejected", {}),
        "max_captions": dataset.max_captions,
        "formats": dict(formats.most_common()),
        "width": describe_numbers(width),
        "height": describe_numbers(height),
        "aspect": describe_numbers(width / np.maximum(height, 1)),
        "image_bytes": describe_numbers(fields["image_size"]),
        "duplicate_pictures": {"groups": int((copies > 1).sum()), "extra": int((copies - 1).sum())},
        "captions": {
            "looked_at": len(captions.characters),
            "characters": describe_numbers(np.array(captions.characters)),
            "words": describe_numbers(np.array(captions.words)),
            "languages": dict(captions.languages.most_common()),
            "vocabulary": len(captions.vocabulary),
            "common_words": captions.vocabulary.most_common(60),
            "repeated_extra": sum(count - 1 for count in captions.texts.values()),
            "repeated": repeated,
            **(_tokens(captions.tokens, context) if tokenizer is not None else {}),
        },
    }


def contact_sheet(dataset: Dataset, count: int) -> list[Picture]:
    """Random images with their captions and columns."""
    pictures = []
    for shard, places in enumerate(choose(dataset, count)):
        with TarReader(dataset.tar_path(shard)) as tar:
            for place in places.tolist():
                row = dataset.shard(shard)[place]
                text = tar.read(row, "text").decode("utf-8", "replace")
                number = int(dataset.counts[shard]) + place
                pictures.append(Picture(number, tar.read(row, "image"), text, int(row["width"]), int(row["height"])))
    return pictures


def main(argv: list[str]) -> int | None:
    parser = Parser("stats", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="folder of shards, or a view")
    parser.add_argument("--out", metavar="DIR", help="folder for stats.json and stats.html (default: DATASET)")
    parser.add_argument(
        "--captions", type=whole(0), default=50_000, metavar="N", help="captions to read, 0 for all (default 50000)"
    )
    parser.add_argument(
        "--pictures", type=whole(0), default=60, metavar="N", help="images on the contact sheet (default 60)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="count tokens with it too: a directory, a tokenizer.json or a name on the hub",
    )
    parser.add_argument(
        "--num-tokens", type=whole(1), default=77, metavar="N", help="the model's context length (default 77, CLIP's)"
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    dataset = open_local(arguments.dataset)
    if not dataset.num_samples:
        raise UserError(f"{arguments.dataset}: has no samples")
    out = make_folder(arguments.out or arguments.dataset)
    if arguments.tokenizer is not None:
        read_tokenizer(arguments.tokenizer)  # a mistake in its name is told here, not by each process
    figures = collect(dataset, arguments.captions, arguments.processes, arguments.tokenizer, arguments.num_tokens)
    write_atomic(out / "stats.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    pictures = contact_sheet(dataset, arguments.pictures) if arguments.pictures else []
    write_atomic(out / "stats.html", render(Path(arguments.dataset).resolve().name, figures, pictures))
    cut = figures["captions"].get("cut")
    told = f"; {cut:.1%} of captions have more than {arguments.num_tokens} tokens" if cut is not None else ""
    print(f"{out}/stats.html and stats.json: {figures['samples']:,} samples{told}", file=sys.stderr)
    return 0
