"""One dataset of shards, read sample by sample with pread: image bytes, captions, metadata.

Only memory-mapped indexes and a few open files are kept; any sample costs one small read, in any order.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format.index import Dataset, Strings
from data_tools.format.scan import read_key
from trainer.core.types import UserError
from trainer.data import datacompdr
from trainer.data.remote import ShardCache
from trainer.data.settings import DataSettings
from trainer.data.transforms import Damaged

OPEN_FILES = 64


class Raw(NamedTuple):
    """One sample as stored in the tars."""

    image: bytes
    captions: list[str]
    """At least one, none empty."""


class OpenTar:
    """A file descriptor that is closed with its last reference, so that it is never closed during a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.length = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardedDataset:
    """Samples 0 .. size - 1 of one dataset. Reading raises Damaged for what is wrong with one sample, UserError for a
    missing file."""

    def __init__(self, dataset: Dataset, fields: list[str], settings: DataSettings, cache: ShardCache | None):
        self.dataset, self.cache, self.check_digests = dataset, cache, settings.check_digests
        self.cache_dir, self.members = settings.cache_dir, dict[int, NDArray[np.void]]()
        self.size = dataset.num_samples
        self.fields = ["captions"] if fields == ["txt"] and dataset.max_captions > 1 else fields
        self.fields = [] if self.fields == ["txt"] else self.fields
        self.columns = {field: _texts(dataset, field) for field in self.fields if field in dataset.columns}
        self.open_files: OrderedDict[int, OpenTar] = OrderedDict()
        self.lock = Lock()
        self.most_open = (
            OPEN_FILES if cache is None else 2 * settings.window
        )  # an evicted file that is open still occupies disk space

    def captions(self, sample: int) -> list[str]:
        """The captions of one sample, without reading its image."""
        return self._captions(sample, *self._entry(sample))

    def read(self, sample: int) -> Raw:
        """Image bytes and captions of one sample."""
        return Raw(self.picture(sample), self.captions(sample))

    def picture(self, sample: int) -> bytes:
        """The image of one sample alone, as it is stored."""
        shard, entry = self._entry(sample)
        if entry["image_size"] == 0:
            raise Damaged("no image")
        image = self._read(shard, entry["image_offset"], entry["image_size"])
        if self.check_digests and entry["digest"] and xxhash.xxh3_64_intdigest(image) != entry["digest"]:
            raise Damaged("image bytes differ from the index")
        return image

    def member(self, sample: int, kind: str) -> bytes:
        """A member beside the sample's own, one of datacompdr.KINDS. Raises Damaged if it has none."""
        return self._member(*self._entry(sample), kind)

    def texts_with_synthetic(self, sample: int, group: int) -> int:
        """The number of the caption with this hash, where the .txt is 0 and synthetic ones follow."""
        shard, entry = self._entry(sample)
        if hash_caption(self._text(shard, entry).strip()) == group:
            return 0
        texts = datacompdr.synthetic_captions(self._member(shard, entry, "syn.json"))
        return 1 + [hash_caption(text.strip()) for text in texts].index(group)

    def metadata(self, sample: int) -> dict[str, Any]:
        """The sample's .json member; empty if it has none."""
        shard, entry = self._entry(sample)
        return self._json(shard, entry)

    def key_hash(self, sample: int) -> int:
        """xxh3_64 of a sample's key: stays with it in a view or a merged dataset."""
        return int(self._entry(sample)[1]["key_hash"])

    def shard_name(self, sample: int) -> str:
        """Path or URL of a sample's tar."""
        return self.dataset.tar_path(self._shard(sample))

    def key(self, sample: int) -> str:
        """A sample's name in messages: TAR:KEY, read from the header before its image."""
        shard, entry = self._entry(sample)
        try:
            key = read_key(self._file(shard).descriptor, entry)
        except (OSError, OverflowError):  # the tar or the index is damaged there
            key = ""
        return f"{self.dataset.tar_path(shard)}:{key or f'sample {sample}'}"

    def close(self) -> None:
        """Closes the open tars."""
        self.open_files.clear()

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self.dataset.counts, sample, side="right")) - 1

    def _entry(self, sample: int) -> tuple[int, np.void]:
        shard = self._shard(sample)
        return shard, self.dataset.shard(shard)[sample - int(self.dataset.counts[shard])]

    def _captions(self, sample: int, shard: int, entry: np.void) -> list[str]:
        if self.fields:
            beside, within = (
                [field for field in self.fields if (field in self.columns) is there] for there in (True, False)
            )
            found = [self.columns[field][sample] for field in beside]
            found += _strings([self._field(shard, entry, field) for field in within])
        else:
            found = [self._text(shard, entry)]
        captions = [caption.strip() for caption in found if caption.strip()]
        if not captions:
            raise Damaged(f"no caption in {' or '.join(self.fields)}" if self.fields else "empty caption")
        return captions

    def _field(self, shard: int, entry: np.void, field: str) -> Any:
        if field == "txt":
            return self._text(shard, entry)
        value = self._json(shard, entry).get(field)
        if value is None and field == datacompdr.SYNTHETIC:
            return datacompdr.synthetic_captions(self._member(shard, entry, "syn.json"))
        # if only other samples have several captions, this one has its caption in .txt only
        return self._text(shard, entry) if value is None and field == "captions" else value

    def _member(self, shard: int, entry: np.void, kind: str) -> bytes:
        if shard not in self.members:
            self.members[shard] = datacompdr.places(self._local(shard), self.cache_dir)
        offset, size = datacompdr.place_of(self.members[shard], int(entry["key_hash"]), kind)
        return self._read(shard, offset, size)

    def _text(self, shard: int, entry: np.void) -> str:
        return self._read(shard, entry["text_offset"], entry["text_size"]).decode("utf-8", "replace")

    def _json(self, shard: int, entry: np.void) -> dict[str, Any]:
        if entry["json_size"] == 0:
            return {}
        try:
            tree = json.loads(self._read(shard, entry["json_offset"], entry["json_size"]))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"its .json is not valid JSON ({error})") from error
        return tree if isinstance(tree, dict) else {}

    def _read(self, shard: int, offset: np.unsignedinteger | int, size: np.unsignedinteger | int) -> bytes:
        length, tar = int(size), self._file(shard)
        if int(offset) + length > tar.length:  # before memory is allocated for the size in a damaged index
            raise Damaged("the tar ends before this sample: it was cut off")
        try:
            return os.pread(tar.descriptor, length, int(offset))
        except OSError as error:
            raise Damaged(f"not readable ({error.strerror})") from error

    def _file(self, shard: int) -> OpenTar:
        with self.lock:  # evaluation reads with several threads
            tar = self.open_files.get(shard)
            if tar is None:
                tar = self.open_files[shard] = self._open(shard)
                if len(self.open_files) > self.most_open:
                    self.open_files.popitem(last=False)
            else:
                self.open_files.move_to_end(shard)
            return tar

    def _open(self, shard: int) -> OpenTar:
        for _ in range(10):
            try:
                return OpenTar(self._local(shard))
            except FileNotFoundError:
                if self.cache is None:
                    break  # otherwise another process has just evicted it: fetch it again
            except OSError as error:
                raise UserError(
                    f"{self.dataset.tar_path(shard)}: cannot be opened ({error.strerror}); check its permissions"
                ) from error
        raise UserError(missing(self.dataset.tar_path(shard)))

    def _local(self, shard: int) -> str:
        path = self.dataset.tar_path(shard)
        return path if self.cache is None else self.cache.fetch(path)


def _texts(dataset: Dataset, name: str) -> Strings:
    column = dataset.column(name)
    if not isinstance(column, Strings):
        raise UserError(
            f"{dataset.root}: the joined column {name!r} holds numbers; data.caption needs a column of texts"
        )
    return column


def missing(path: str) -> str:
    """The error for a missing tar."""
    return (
        f"{path}: no such shard; copy it there, or rebuild the manifest with `python -m data_tools index "
        f"{os.path.dirname(path)}`"
    )


def _strings(values: list[Any]) -> list[str]:
    found: list[str] = []
    for value in values:
        found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    return found


def hash_caption(caption: str) -> int:
    """xxh3_64 of a caption as a signed 64-bit integer: equal captions are one group."""
    value = xxhash.xxh3_64_intdigest(caption.encode("utf-8", "replace"))
    return value - (1 << 64) if value >> 63 else value
