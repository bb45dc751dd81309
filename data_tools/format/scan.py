"""Scans any tar, sorted or not: finds its samples from the headers, and reads keys back from them.

rows, problems = scan_tar("00000.tar")                  # rows of an index, as in format/index.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format.index import IMAGE_FORMATS, ROW
from data_tools.format.tar_reader import BLOCK, Member, TarProblem, names_before, walk

_MAX_MEMBER = 2**32 - 1
_KINDS = {**dict.fromkeys(IMAGE_FORMATS, "image"), "txt": "text", "json": "json"}
_BESIDE = (".syn", ".paug", ".url")
"""Ends of KEY in KEY.json and KEY.txt that belong to the sample without them."""


def split_name(name: str) -> tuple[str, str]:
    """A member's name as (key, extension): "a/b.jpg" -> ("a/b", "jpg"). If the last extension is a known one, the key
    is all before it, so that "x.v1.jpg" and "x.v2.jpg" are two samples; otherwise the key ends at the first dot, as in
    webdataset. Without a dot the extension is empty.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, last = base.rpartition(".")
    if last.lower() in _KINDS and stem:
        return folder + slash + stem, last.lower()
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest.lower()


def scan_samples(path: str | Path, problems: list[TarProblem]) -> list[tuple[str, dict[str, Member]]]:
    """The samples of any tar, sorted or not, as (key, {"image" | "text" | "json": member}), ordered by the position of
    their image. A sample needs an image and a text or json; others are added to ``problems`` as missing_image or
    missing_text.
    """
    open_samples: dict[str, dict[str, Member]] = {}
    closed: list[tuple[str, dict[str, Member]]] = []
    for member in walk(path, problems):
        key, extension = split_name(member.name)
        kind = _KINDS.get(extension)
        if kind is None or key.rpartition("/")[2].startswith("."):
            continue
        if member.size > _MAX_MEMBER or (kind == "image" and not member.size):
            problems.append(
                TarProblem(member.offset - BLOCK, "too_large" if member.size else "empty_file", member.name)
            )
            continue
        sample = open_samples.setdefault(key, {})
        if kind in sample:
            problems.append(TarProblem(member.offset - BLOCK, "duplicate_key", key))
            if "image" not in sample or len(sample) < 2:
                continue
            closed.append((key, sample))
            sample = open_samples[key] = {}
        sample[kind] = member
    closed.extend(open_samples.items())
    whole, keys = [], {key for key, sample in closed if "image" in sample}
    for key, sample in closed:
        if "image" in sample and len(sample) > 1:
            whole.append((key, sample))
        elif key.endswith(_BESIDE) and key.rpartition(".")[0] in keys:
            continue  # DataCompDR's, which trainer/data/datacompdr.py reads
        else:
            offset = min(member.offset for member in sample.values())
            problems.append(TarProblem(offset, "missing_text" if "image" in sample else "missing_image", key))
    return sorted(whole, key=lambda item: item[1]["image"].offset)


def scan_tar(path: str | Path) -> tuple[NDArray[np.void], list[TarProblem]]:
    """(Rows [n] of dtype ROW, problems) for any tar, from its headers. Images are hashed; sizes in pixels stay 0."""
    problems: list[TarProblem] = []
    samples = scan_samples(path, problems)
    rows = np.zeros(len(samples), ROW)
    with open(path, "rb") as file:
        for row, (key, sample) in zip(rows, samples, strict=True):
            for kind, member in sample.items():
                row[f"{kind}_offset"], row[f"{kind}_size"] = member.offset, member.size
            image = sample["image"]
            row["image_format"] = IMAGE_FORMATS[split_name(image.name)[1]]
            row["key_hash"] = hash_key(key)
            row["digest"] = xxhash.xxh3_64_intdigest(os.pread(file.fileno(), image.size, image.offset))
    return rows, problems


def hash_key(key: str) -> int:
    """xxh3_64 of a key, as in the index."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))


def read_key(descriptor: int, row: np.void) -> str:
    """The key of one sample, read from the headers before its image in the tar open at ``descriptor``. If no header
    has the indexed key (a damaged header, or a tar that the index does not belong to), the key in the nearest one.
    """
    return find_key(descriptor, int(row["image_offset"]), int(row["key_hash"]))


def find_key(descriptor: int, image_offset: int, key_hash: int) -> str:
    """Like ``read_key``, from the image's offset and the hash of its key."""
    nearest = ""
    for name in names_before(descriptor, image_offset):
        key = split_name(name)[0]
        if hash_key(key) == key_hash:
            return key
        nearest = nearest or key
    return nearest
