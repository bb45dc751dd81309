"""A folder of pictures with captions beside them, and COCO's captions file."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.index import IMAGE_FORMATS
from data_tools.io.errors import UserError
from data_tools.samples.reject import fault_of
from data_tools.sources.base import Problem, Row, SourceOptions, hash_file, hash_text, split_columns

_SIDE = ("txt", "json")


class FolderSource:
    """Pictures anywhere below a folder, each with NAME.txt (its caption), NAME.json (columns, "caption" among them) or
    both."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.options = path, options
        self.problems: list[Problem] = []
        self.columns: list[str] = []
        sizes: dict[str, int] = {}
        for folder, folders, files in os.walk(path, followlinks=False):
            folders.sort()
            for name in files:
                full = os.path.join(folder, name)
                if (
                    name.rpartition(".")[2].lower() in (*IMAGE_FORMATS, *_SIDE)
                    and not name.startswith(".")
                    and os.path.isfile(full)
                ):
                    sizes[os.path.relpath(full, path)] = os.stat(full).st_size
        self._sides = {name for name in sizes if name.rpartition(".")[2].lower() in _SIDE}
        self._images = sorted(sizes.keys() - self._sides)
        if self._images and not self._sides:
            raise UserError(
                f"{path}: no picture has a caption beside it, as NAME.txt or NAME.json; if a table has them, name "
                f"the table"
            )
        if options.captions and not any(name.lower().endswith(".json") for name in self._sides):
            raise UserError(
                f"{path}: --caption names a key of NAME.json, and there is none beside the pictures; leave it out "
                f"for NAME.txt"
            )
        stems = {name.rpartition(".")[0] for name in self._images}
        orphans = sorted(name for name in self._sides if name.rpartition(".")[0] not in stems)
        # img2dataset leaves a NNNNN_stats.json beside each folder of pictures
        self.problems = [
            Problem(name.rpartition(".")[0], "missing_image", name)
            for name in orphans
            if not name.endswith("_stats.json")
        ]
        self.blocks = [len(self._images)]
        self._print = hash_text(sorted(sizes.items()))

    def fingerprint(self) -> str:
        """Names and sizes; a caption changed to another of the same length is not noticed."""
        return self._print

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        for number in numbers.tolist():
            name = self._images[number]
            stem = name.rpartition(".")[0]
            record: Any = {}
            captions: list[Any] = []
            try:
                if f"{stem}.json" in self._sides:
                    record = json.loads((self.path / f"{stem}.json").read_bytes())
                if f"{stem}.txt" in self._sides:
                    captions = [(self.path / f"{stem}.txt").read_bytes().decode("utf-8")]
            except ValueError as error:
                yield Row(name, name, [], fault=fault_of(error))
                continue
            if not isinstance(record, dict):
                yield Row(name, name, [], fault="row_malformed")
                continue
            if self.options.captions or not captions:
                wanted = self.options if self.options.captions else SourceOptions(captions=("caption",))
                _, captions, record = split_columns(record, wanted)
            yield Row(name, name, captions, record)


class CocoSource:
    """COCO's captions JSON: one row a picture, with all its captions. Paths start at ``--images``."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.options = path, options
        self.problems: list[Problem] = []
        self.columns = ["image_id"]
        if options.captions:
            raise UserError(f"{path}: --caption names a column of a table, and this is COCO captions; leave it out")
        try:
            tree = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path}: not readable as JSON ({error}); for one JSON object a line say --input jsonl"
            ) from None
        if (
            not isinstance(tree, dict)
            or not isinstance(tree.get("images"), list)
            or not isinstance(tree.get("annotations"), list)
        ):
            raise UserError(
                f'{path}: not COCO captions, which have "images" and "annotations"; for one JSON object a line say '
                f"--input jsonl"
            )
        captions: dict[Any, list[Any]] = defaultdict(list)
        for annotation in tree["annotations"]:
            captions[annotation.get("image_id")].append(annotation.get("caption"))
        self._rows = [
            (image.get("id"), image.get("file_name"), captions.get(image.get("id"), [])) for image in tree["images"]
        ]
        known = {image for image, _, _ in self._rows}
        self.problems = [
            Problem(str(key), "missing_image", f"{path.name}: image_id {key}") for key in captions if key not in known
        ]
        self.blocks = [len(self._rows)]

    def fingerprint(self) -> str:
        return hash_file(self.path)

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        for number in numbers.tolist():
            image_id, name, captions = self._rows[number]
            yield Row(f"{self.path.name}: image_id {image_id}", name, captions, {"image_id": image_id})
