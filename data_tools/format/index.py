"""The index of a sharded dataset: offset and size of each picture and caption, and a digest of each picture.

    dataset = Dataset.open("shards/train")
    shard, row = dataset.locate(np.array([17, 40_000]))     # sample numbers -> shard numbers and rows in them
    entry = dataset.shard(int(shard[0]))[int(row[0])]       # one ROW, mapped from disk
    with open(dataset.tar_path(int(shard[0])), "rb") as tar:
        picture = os.pread(tar.fileno(), int(entry["image_size"]), int(entry["image_offset"]))

The tars are plain webdataset. A sample is KEY.jpg|png|webp, KEY.txt (its caption, or the first of several) and
KEY.json: the columns of the input and, if there are several captions, the list "captions" (`Dataset.max_captions` says
whether any sample has several).
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from threading import Lock
from tokenize import TokenError
from typing import Any

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format.tar_reader import BLOCK, Member, TarProblem, names_before, walk
from data_tools.io.errors import UserError
from data_tools.io.remote import require_backend

FORMAT, VERSION = "ringlip-shards", 1
MANIFEST = "manifest.json"

ROW = np.dtype(
    [
        ("image_offset", "<u8"),
        ("image_size", "<u4"),
        ("image_format", "u1"),
        ("text_offset", "<u8"),
        ("text_size", "<u4"),
        ("json_offset", "<u8"),
        ("json_size", "<u4"),
        ("key_hash", "<u8"),
        ("digest", "<u8"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)
"""One sample. Offsets point to a member's data in the tar; a size of 0 means that there is no such member. ``key_hash``
is xxh3_64 of the key, ``digest`` xxh3_64 of the picture's bytes; ``width`` and ``height`` are 0 if unknown."""

IMAGE_FORMATS = {
    "jpg": 1,
    "jpeg": 1,
    "png": 2,
    "webp": 3,
    "gif": 0,
    "bmp": 0,
    "tif": 0,
    "tiff": 0,
    "avif": 0,
    "ppm": 0,
    "jp2": 0,
}
"""Extension -> ``image_format``: 1 JPEG, 2 PNG, 3 WebP, 0 any other."""
_MAX_MEMBER = 2**32 - 1
_KINDS = {**dict.fromkeys(IMAGE_FORMATS, "image"), "txt": "text", "json": "json"}


class Strings:
    """A memory-mapped column of texts: ``column[sample]`` is a str, "" where the joined table had no row."""

    def __init__(self, edges: NDArray[np.int64], text: NDArray[np.uint8]) -> None:
        self._edges, self._text = edges, text

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, sample: int) -> str:
        return bytes(self._text[int(self._edges[sample]) : int(self._edges[sample + 1])]).decode()


class Dataset:
    """A folder (or fsspec URL) of shards with its manifest. Opening reads only the manifest; indexes are memory-mapped
    on first use."""

    def __init__(self, root: str, manifest: dict[str, Any]) -> None:
        self.root, self.manifest = root, manifest
        sizes = [int(entry["samples"]) for entry in manifest["shards"]]
        self.counts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]).astype(np.int64)
        """int64 [num_shards + 1]: shard i has the samples range(counts[i], counts[i + 1])."""
        self._maps: dict[int, NDArray[np.void]] = {}

    @classmethod
    def open(cls, root: str | Path) -> Dataset:
        """The dataset in a local folder or at an fsspec URL. Raises UserError if there is no manifest, or it is not one
        that `data_tools` wrote."""
        root = str(root).rstrip("/") or "/"
        path = f"{root}/{MANIFEST}"
        if "://" in root:
            require_backend(root)
        try:
            manifest = json.loads(read_bytes(path))
        except FileNotFoundError:
            remedy = (
                "finish `python -m data_tools shard` (a rerun continues), or `python -m data_tools index` for "
                "tars of other tools"
            )
            raise UserError(f"{path}: no such file; {remedy}") from None
        except NotADirectoryError:
            raise UserError(f"{root}: a file; name the folder of a dataset, the one with {MANIFEST}") from None
        except ValueError as error:
            raise UserError(
                f"{path}: not readable as JSON ({error}); rewrite it with `python -m data_tools merge`"
            ) from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path}: not a manifest of {FORMAT}; make one with `python -m data_tools index`")
        if manifest["version"] != VERSION:
            raise UserError(
                f"{path}: version {manifest['version']}, this reader knows {VERSION}; install the RingLIP that wrote it"
            )
        check_names(path, manifest)
        return cls(root, manifest)

    @property
    def num_samples(self) -> int:
        return int(self.counts[-1])

    @property
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    @property
    def max_captions(self) -> int:
        """The largest number of captions of any sample; if above 1, ``captions`` in KEY.json lists them."""
        return int(self.manifest.get("max_captions", 1))

    @property
    def is_remote(self) -> bool:
        """Whether tars must be fetched through fsspec instead of opened."""
        return "://" in self.root

    def tar_path(self, shard: int) -> str:
        """Path or URL of a shard's tar. A view has no tars: its paths point into the dataset that it was made from."""
        entry = self.manifest["shards"][shard]
        path = str(entry.get("path", entry["name"]))
        if "://" in path or path.startswith("/"):
            return path
        return f"{self.root}/{path}" if self.is_remote else os.path.normpath(f"{self.root}/{path}")

    def index_path(self, shard: int) -> str:
        """Path or URL of a shard's index."""
        return f"{self.root}/{index_name(self.manifest['shards'][shard]['name'])}"

    def shard(self, shard: int) -> NDArray[np.void]:
        """The rows of one shard, dtype ROW, memory-mapped read-only (in memory if remote). Raises UserError if the
        index is missing or incomplete."""
        rows = self._maps.get(shard)
        if rows is None:
            rows = self._maps[shard] = self._load(shard)
        return rows

    def _load(self, shard: int) -> NDArray[np.void]:
        path = self.index_path(shard)
        remedy = f"rebuild it with `python -m data_tools index {self.root}`"
        try:
            rows = load_array(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; {remedy}") from None
        except ValueError as error:
            raise UserError(f"{path}: not an index ({error}); {remedy}") from None
        expected = int(self.counts[shard + 1] - self.counts[shard])
        if rows.dtype != ROW or rows.shape != (expected,):
            raise UserError(f"{path}: {rows.shape} rows, but the manifest says {expected}; {remedy}")
        return rows

    def locate(self, samples: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample numbers [n] -> (shard numbers [n], rows in those shards [n]), int64. Raises IndexError outside 0 ..
        num_samples - 1."""
        samples = np.asarray(samples, np.int64)
        if samples.size and (samples.min() < 0 or samples.max() >= self.num_samples):
            raise IndexError(f"{self.root}: samples are 0 .. {self.num_samples - 1}")
        shards = np.searchsorted(self.counts, samples, side="right") - 1
        return shards, samples - self.counts[shards]

    @property
    def columns(self) -> list[str]:
        """Names of the side-car columns (see `python -m data_tools join`)."""
        return sorted(self.manifest.get("columns", {}))

    def column(self, name: str) -> NDArray[Any] | Strings:
        """A side-car column in sample order: a memory-mapped array [num_samples, ...], or `Strings`. Raises UserError
        if there is none or its file cannot be read."""
        if name not in self.columns:
            raise UserError(f"{self.root}: no side-car column {name!r}; there are: {', '.join(self.columns) or 'none'}")
        entry = self.manifest["columns"][name]
        values = self._column_file(entry["file"])
        return Strings(values, self._column_file(entry["text"])) if "text" in entry else values

    def _column_file(self, file: str) -> NDArray[Any]:
        path, remedy = f"{self.root}/{file}", "join it again, or run `python -m trainer.embed` again if that wrote it"
        try:
            return load_array(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but {MANIFEST} names it; {remedy}") from None
        except ValueError as error:
            raise UserError(f"{path}: not a column ({error}); {remedy}") from None


def check_names(path: str, manifest: dict[str, Any]) -> None:
    """Raises UserError for a shard name that is not a plain file name: an index is written beside each shard."""
    for entry in manifest.get("shards", []):
        name = entry.get("name")
        if not isinstance(name, str) or "/" in name or name.startswith("."):
            raise UserError(f"{path}: {name!r} cannot be the name of a shard, which is a file in its folder; remove it")


# NumPy parses a header with ast.literal_eval, which raises SystemError at random when two threads call it (CPython
# before 3.12).
_parsing = Lock()


def load_array(path: str) -> NDArray[Any]:
    """The array in a .npy file: memory-mapped if local, read if remote. Raises FileNotFoundError, or ValueError if it
    is not a complete .npy file."""
    local = "://" not in path
    source: Any = path if local else io.BytesIO(read_bytes(path))
    try:
        with _parsing:
            return np.asanyarray(np.load(source, mmap_mode="r" if local else None, allow_pickle=False))
    except EOFError:  # 0 bytes, as a full disk leaves them
        raise ValueError("the file is empty") from None
    except (SyntaxError, TokenError, TypeError, OverflowError) as error:
        raise ValueError(f"a damaged header: {' '.join(str(error).split())}") from None


def read_bytes(path: str) -> bytes:
    """The content of a file, local or at an fsspec URL. Raises FileNotFoundError."""
    if "://" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def index_name(tar_name: str) -> str:
    """00000.tar -> 00000.idx"""
    return tar_name.removesuffix(".tar") + ".idx"


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
    their picture. A sample needs a picture and a text or json; others are added to ``problems`` as missing_image or
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
    whole = []
    for key, sample in closed:
        if "image" in sample and len(sample) > 1:
            whole.append((key, sample))
        else:
            offset = min(member.offset for member in sample.values())
            problems.append(TarProblem(offset, "missing_text" if "image" in sample else "missing_image", key))
    return sorted(whole, key=lambda item: item[1]["image"].offset)


def scan_tar(path: str | Path) -> tuple[NDArray[np.void], list[TarProblem]]:
    """(Rows [n] of dtype ROW, problems) for any tar, from its headers. Pictures are hashed; sizes in pixels stay 0."""
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
    """The key of one sample, read from the headers before its picture in the tar open at ``descriptor``. If no header
    has the indexed key (a damaged header, or a tar that the index does not belong to), the key in the nearest one.
    """
    return find_key(descriptor, int(row["image_offset"]), int(row["key_hash"]))


def find_key(descriptor: int, image_offset: int, key_hash: int) -> str:
    """Like ``read_key``, from the picture's offset and the hash of its key."""
    nearest = ""
    for name in names_before(descriptor, image_offset):
        key = split_name(name)[0]
        if hash_key(key) == key_hash:
            return key
        nearest = nearest or key
    return nearest
