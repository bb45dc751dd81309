"""Webdataset tars of any tool (such as img2dataset), read in any order after one pass over their headers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.format import tar_reader
from data_tools.format.scan import find_key, hash_key, scan_samples
from data_tools.samples.reject import fault_of
from data_tools.sources.base import Problem, Row, SourceOptions, hash_text
from data_tools.sources.values import RowMaker

_PLACE = np.dtype(
    [("tar", "<u4"), *((f"{kind}_{what}", "<u8") for kind in ("image", "text", "json") for what in ("offset", "size"))]
)

_TEXT = RowMaker(SourceOptions())
_SEVERAL, _ONE = RowMaker(SourceOptions(captions=("captions",))), RowMaker(SourceOptions(captions=("caption",)))


class TarSource:
    """Samples of one or several tars. Damage is reported with its offset; intact samples behind it are read."""

    def __init__(self, paths: list[Path], options: SourceOptions, kept: Any = None) -> None:
        self.paths, self.options, self._kept = paths, options, kept  # ``kept``: temporary files among the paths
        self.problems: list[Problem] = []
        self.columns: list[str] = []
        self._make = RowMaker(options)
        self.classes: list[str] = []
        found, hashes = [], []
        for number, path in enumerate(paths):
            problems: list[tar_reader.TarProblem] = []
            samples = scan_samples(path, problems)
            places = np.zeros(len(samples), _PLACE)
            places["tar"] = number
            for place, (_, sample) in zip(places, samples, strict=True):
                for kind, member in sample.items():
                    place[f"{kind}_offset"], place[f"{kind}_size"] = member.offset, member.size
            found.append(places)
            hashes.append(np.array([hash_key(key) for key, _ in samples], np.uint64))
            self.problems += [
                Problem(problem.name, problem.reason, f"{path.name}@{problem.offset}") for problem in problems
            ]
        self._places = np.concatenate(found)
        self._hashes = np.concatenate(hashes)
        self.blocks = [len(self._places)]
        self._descriptors: dict[int, int] = {}

    def fingerprint(self) -> str:
        sizes = [(path.name, path.stat().st_size) for path in self.paths]
        return hash_text(
            sizes, xxhash.xxh3_128_hexdigest(self._places.tobytes()), [problem._asdict() for problem in self.problems]
        )

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        for place, key_hash in zip(self._places[numbers], self._hashes[numbers].tolist(), strict=True):
            descriptor = self._open(int(place["tar"]))
            key = find_key(descriptor, int(place["image_offset"]), key_hash)
            source = f"{self.paths[int(place['tar'])].name}:{key}"
            image = os.pread(descriptor, int(place["image_size"]), int(place["image_offset"]))
            try:
                record = json.loads(os.pread(descriptor, int(place["json_size"]), int(place["json_offset"])) or b"{}")
                text = os.pread(descriptor, int(place["text_size"]), int(place["text_offset"])).decode("utf-8")
            except ValueError as error:
                yield Row(source, image, [], fault=fault_of(error))
                continue
            except RecursionError:
                yield Row(source, image, [], fault="not_json")
                continue
            if not isinstance(record, dict):
                yield Row(source, image, [], fault="row_malformed")
                continue
            row = self._row(source, record, [text] if place["text_size"] else [])
            row.image = image
            yield row

    def _row(self, source: str, record: dict[str, Any], texts: list[str]) -> Row:
        """The row of a sample. Its captions: the columns in --caption, else the list that `shard` writes, else the
        text."""
        record.pop("sample", None)
        if self.options.captions or self.options.templates:
            return self._make(source, record)
        if isinstance(record.get("captions"), list):
            return _SEVERAL(source, record)
        record.pop("captions", None)
        if not texts and "caption" in record:
            return _ONE(source, record)
        row = _TEXT(source, record)
        row.captions = texts
        return row

    def _open(self, tar: int) -> int:
        # Descriptors stay open, because a permuted order comes back to every tar, up to a number that limits allow.
        descriptor = self._descriptors.get(tar)
        if descriptor is None:
            if len(self._descriptors) >= 200:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._descriptors[tar] = os.open(self.paths[tar], os.O_RDONLY)
        return descriptor
