"""The index of a sharded dataset: offset and size of each image and caption, and a digest of each image.

    dataset = Dataset.open("shards/train")
    shard, row = dataset.locate(np.array([17, 40_000]))     # sample numbers -> shard numbers and rows in them
    entry = dataset.shard(int(shard[0]))[int(row[0])]       # one ROW, mapped from disk
    with open(dataset.tar_path(int(shard[0])), "rb") as tar:
        image = os.pread(tar.fileno(), int(entry["image_size"]), int(entry["image_offset"]))

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
from numpy.typing import NDArray

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
is xxh3_64 of the key, ``digest`` xxh3_64 of the image's bytes; ``width`` and ``height`` are 0 if unknown."""

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
