"""Drops duplicate images. Writes a view: a dataset without tars of its own, whose indexes
point to the samples of DATASET that are kept. Nothing is copied, so DATASET must stay where it is.

    python -m data_tools dedup DATASET OUT                 # equal bytes
    python -m data_tools dedup DATASET OUT --near 4        # also perceptual hashes at most 4 of 64 bits apart
    python -m data_tools dedup DATASET OUT --same-caption  # only where the captions are equal too

Of each group of duplicates, the image with the most pixels is kept, or the first of several. OUT/duplicates.jsonl
lists every dropped sample with the one that was kept for it. The perceptual hash is the DCT hash (Zauner 2010,
"Implementation and benchmarking of perceptual image hash functions"); flat images, which all have the same hash, are
compared by their bytes only.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from data_tools.commands.arguments import Parser, add_processes, whole
from data_tools.commands.merge import summary
from data_tools.format.index import Dataset
from data_tools.format.map_shards import TarReader, open_local, over_shards
from data_tools.format.scan import read_key
from data_tools.format.view import open_view, write_view
from data_tools.samples.decoding import decode
from data_tools.samples.reject import Reject

_SIDE, _KEPT = 32, 8
_MAX_BUCKET = 2000
"""Largest bucket (images that share one band of their hash) that is compared pairwise; in a larger one, each image
is compared with its neighbours only."""


def _dct_rows() -> NDArray[np.float32]:
    angle = np.pi * np.outer(np.arange(1, _KEPT + 1), np.arange(_SIDE) + 0.5) / _SIDE
    return np.cos(angle).astype(np.float32)


_DCT = _dct_rows()


def perceptual_hash(image: bytes) -> int | None:
    """64 bits that hardly change when an image is scaled or compressed; None for a flat image. Raises Reject if the
    image is damaged."""
    grey = Image.fromarray(decode(image, least=(2 * _SIDE, 2 * _SIDE))).convert("L")
    pixels = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    parts = _DCT @ pixels @ _DCT.T
    if np.abs(parts).max() < 16 * _SIDE:
        return None
    return int(np.packbits(parts.ravel() > np.median(parts)).view(">u8")[0])


def _hash_shard(
    dataset: Dataset, near: bool, captions: bool, shard: int
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.uint64]]:
    """(Perceptual hashes, whether each is valid, caption hashes), each [num_samples]."""
    rows = dataset.shard(shard)
    hashes, valid, texts = np.zeros(len(rows), np.uint64), np.zeros(len(rows), bool), np.zeros(len(rows), np.uint64)
    with TarReader(dataset.tar_path(shard)) as tar:
        for place, row in enumerate(rows):
            if captions:
                texts[place] = xxhash.xxh3_64_intdigest(tar.read(row, "text"))
            if near:
                try:
                    found = perceptual_hash(tar.read(row, "image"))
                except Reject:
                    found = None  # verify reports damaged images; here they match equal bytes only
                if found is not None:
                    hashes[place], valid[place] = found, True
    return hashes, valid, texts


class _Groups:
    """Union-find over sample numbers."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = int(self.parent[item])
        return item

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self.parent[second] = first


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> list[tuple[int, int]]:
    """Pairs (i, j) of hashes [n] that differ in at most ``distance`` bits: cut into distance + 1 bands, two such hashes
    agree in at least one band."""
    pairs: set[tuple[int, int]] = set()
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.lexsort((hashes, band))
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, cuts):
            for offset in range(1, min(len(bucket), _MAX_BUCKET)):
                left, right = bucket[:-offset], bucket[offset:]
                close = np.bitwise_count(hashes[left] ^ hashes[right]) <= distance
                pairs.update(zip(left[close].tolist(), right[close].tolist(), strict=True))
    return sorted(pairs)


def find_groups(dataset: Dataset, near: int | None, same_caption: bool, processes: int) -> NDArray[np.int64]:
    """For each sample [num_samples] the number of the sample that is kept for it (its own where it is kept)."""
    rows = [dataset.shard(shard) for shard in range(dataset.num_shards)]
    digests = np.concatenate([part["digest"] for part in rows])
    pixels = np.concatenate([part["width"].astype(np.int64) * part["height"] for part in rows])
    groups = _Groups(len(digests))
    texts = np.zeros(len(digests), np.uint64)
    near_hashes = valid = None
    if near is not None or same_caption:
        found = list(
            over_shards(partial(_hash_shard, dataset, near is not None, same_caption), dataset.num_shards, processes)
        )
        near_hashes, valid, texts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((digests, texts))
    same = (digests[order[1:]] == digests[order[:-1]]) & (texts[order[1:]] == texts[order[:-1]])
    for place in np.flatnonzero(same).tolist():
        groups.join(int(order[place]), int(order[place + 1]))
    if near is not None and near_hashes is not None and valid is not None:
        numbers = np.flatnonzero(valid)
        for one, other in near_pairs(near_hashes[numbers], near):
            if texts[numbers[one]] == texts[numbers[other]]:
                groups.join(int(numbers[one]), int(numbers[other]))
    return _choose(np.array([groups.find(sample) for sample in range(len(digests))]), pixels)


def _choose(roots: NDArray[np.int64], pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sample with the most pixels in each group, the first of several."""
    order = np.lexsort((np.arange(len(roots)), -pixels, roots))
    first = np.concatenate([[True], np.diff(roots[order]) != 0])
    best = np.zeros(len(roots), np.int64)
    best[roots[order[first]]] = order[first]
    return best[roots]


def main(argv: list[str]) -> int | None:
    parser = Parser("dedup", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="folder of shards, or a view")
    parser.add_argument("out", metavar="OUT", help="a new folder for the view")
    parser.add_argument(
        "--near",
        type=whole(0, 16),
        metavar="BITS",
        help="also drop those whose perceptual hashes differ in at most BITS of 64 bits, 0 to 16; 4 finds scaled and "
        "recompressed copies",
    )
    parser.add_argument(
        "--same-caption", action="store_true", help="two samples are duplicates only where their captions are equal too"
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    dataset = open_local(arguments.dataset)
    output = open_view(arguments.out, dataset)
    stands = find_groups(dataset, arguments.near, arguments.same_caption, arguments.processes)
    keep = stands == np.arange(len(stands))
    made_by: dict[str, Any] = {"command": "dedup", "near": arguments.near, "same_caption": arguments.same_caption}
    output.start()
    output.write("duplicates.jsonl", _lines(dataset, stands, np.flatnonzero(~keep)))
    manifest = write_view(output, dataset, keep, made_by)
    print(f"dropped {int((~keep).sum()):,} of {len(keep):,} | {summary(arguments.out, manifest)}", file=sys.stderr)
    return 0


def _lines(dataset: Dataset, stands: NDArray[np.int64], dropped: NDArray[np.int64]) -> bytes:
    keys = _keys(dataset, np.concatenate([dropped, stands[dropped]]))
    lines = [{"key": keys[int(sample)], "same_as": keys[int(stands[sample])]} for sample in dropped]
    # Bytes of a key that are not UTF-8 are written as \udcXX, which JSON reads back as the same key.
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "backslashreplace")


def _keys(dataset: Dataset, samples: NDArray[np.int64]) -> dict[int, str]:
    """Sample number -> key."""
    shards, rows = dataset.locate(np.unique(samples))
    found: dict[int, str] = {}
    for shard in np.unique(shards).tolist():
        with TarReader(dataset.tar_path(shard)) as tar:
            for row in rows[shards == shard].tolist():
                found[int(dataset.counts[shard]) + row] = read_key(tar.descriptor, dataset.shard(shard)[row])
    return found
