"""Images with caption files beside them, images in class folders, and COCO's captions file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.index import IMAGE_FORMATS
from data_tools.io.errors import UserError
from data_tools.samples.reject import Reject, fault_of
from data_tools.sources.base import Problem, Row, SourceOptions, fields_of, hash_file
from data_tools.sources.trees import Tree
from data_tools.sources.values import RowMaker, to_row

_SIDE = ("txt", "json")
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def is_pair_part(name: str) -> bool:
    """Whether a file is an image, or may belong to one, by its name."""
    return name.rpartition(".")[2].lower() in (*IMAGE_FORMATS, *_SIDE)


class FolderSource:
    """Images anywhere in a tree, each with NAME.txt (its caption), NAME.json (columns, such as "caption") or both.
    With a template also images without either, whose folder is their class: cats/1.jpg."""

    def __init__(self, tree: Tree, options: SourceOptions) -> None:
        self.tree, self.options = tree, options
        if options.image is not None:
            raise UserError(
                f"{tree.path}: --image names a column of a table, but this is a folder of images; remove it, or "
                f"name the table"
            )
        names = [name for name in tree.names if is_pair_part(name)]
        self.columns: list[str] = []
        self._sides = {name for name in names if name.rpartition(".")[2].lower() in _SIDE}
        self._images = [name for name in names if name not in self._sides]
        self._folders: dict[str, int] = {}
        if any("class" in fields_of(template) for template in options.templates):
            self._read_classes()
        elif self._images and not self._sides:
            raise UserError(
                f"{tree.path}: no image has a caption beside it, as NAME.txt or NAME.json; if a table has them, name "
                f"the table; if folders are classes (cats/1.jpg) add --caption-template 'a photo of a {{class}}'"
            )
        self.classes = [_spaced(name) for name in self._folders]
        if options.captions and not any(name.lower().endswith(".json") for name in self._sides):
            raise UserError(
                f"{tree.path}: --caption names a key of NAME.json, and there is none beside the images; leave it out "
                f"for NAME.txt"
            )
        stems = {name.rpartition(".")[0] for name in self._images}
        orphans = sorted(name for name in self._sides if name.rpartition(".")[0] not in stems)
        # img2dataset leaves a NNNNN_stats.json beside each folder of images
        self.problems = tree.problems + [
            Problem(name.rpartition(".")[0], "missing_image", name)
            for name in orphans
            if not name.endswith("_stats.json")
        ]
        self.blocks = [len(self._images)]
        self._named = bool(options.captions or options.templates)
        self._make_texts = RowMaker(options)
        self._make = self._make_texts if self._named else RowMaker(replace(options, captions=("caption",)))

    def _read_classes(self) -> None:
        refuse_splits(self.tree, self._images)
        folders = {_folder_of(name) for name in self._images} - {""}
        self._folders = {folder: number for number, folder in enumerate(sorted(folders))}
        if self._images and len(folders) < 2:
            raise UserError(
                f"{self.tree.path}: {{class}} is the folder of an image, and there is "
                f"{'one: ' + folders.pop() if folders else 'none'}; two or more are needed, such as cats/1.jpg, "
                "dogs/2.jpg"
            )

    def fingerprint(self) -> str:
        return self.tree.fingerprint()

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        for number in numbers.tolist():
            name = self._images[number]
            try:
                yield self._row(name)
            except Reject as reject:
                yield Row(name, None, [], fault=reject.reason, detail=reject.path)
            except ValueError as error:
                yield Row(name, name, [], fault=fault_of(error))
            except RecursionError:
                yield Row(name, name, [], fault="not_json")

    def _row(self, name: str) -> Row:
        stem = name.rpartition(".")[0]
        record: Any = {}
        texts: list[str] = []
        if f"{stem}.json" in self._sides:
            record = json.loads(self.tree.read(f"{stem}.json"))
        if f"{stem}.txt" in self._sides:
            texts = [self.tree.read(f"{stem}.txt").decode("utf-8")]
        if not isinstance(record, dict):
            raise Reject("row_malformed")
        folder = _folder_of(name)
        if folder in self._folders:
            record |= {"class": _spaced(folder), "cls": self._folders[folder]}
        row = (self._make_texts if texts else self._make)(name, record)
        row.image = self.tree.picture(name)
        if texts and not self._named:
            row.captions = texts
        return row


def _folder_of(name: str) -> str:
    """The folder of an image: photos/cats/1.jpg -> cats."""
    return name.rpartition("/")[0].rpartition("/")[2]


def _spaced(name: str) -> str:
    """A folder name as words: golden_retriever -> golden retriever."""
    return " ".join(name.replace("_", " ").split()) or name


def refuse_splits(tree: Tree, names: list[str]) -> None:
    """Raises UserError if ``names`` are in several splits: test images must not get into training by accident."""
    found = sorted({part for name in names for part in name.split("/")[:-1] if part.lower() in SPLITS})
    if len(found) > 1:
        example = next(name for name in names if found[0] in name.split("/")[:-1])
        place = example[: example.index(f"{found[0]}/") + len(found[0])]
        raise UserError(f"{tree.path}: has several splits ({', '.join(found)}); name one: {tree.path}/{place}")


_COCO = SourceOptions("image", ("caption",))


class CocoSource:
    """COCO's captions JSON: one row per image, with all its captions. Paths start from ``--images``."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.options = path, options
        self.problems: list[Problem] = []
        self.columns = ["image_id"]
        self.classes: list[str] = []
        if options.captions or options.templates:
            raise UserError(f"{path}: --caption names a column of a table, but this is COCO captions; remove it")
        try:
            tree = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: not readable as JSON ({error}); for one JSON object per line use --input jsonl"
            ) from None
        if (
            not isinstance(tree, dict)
            or not isinstance(tree.get("images"), list)
            or not isinstance(tree.get("annotations"), list)
        ):
            raise UserError(
                f'{path}: not COCO captions, which have "images" and "annotations"; for one JSON object per line use '
                f"--input jsonl"
            )
        captions: dict[Any, list[Any]] = defaultdict(list)
        for annotation in _objects(path, tree, "annotations", "image_id"):
            captions[annotation.get("image_id")].append(annotation.get("caption"))
        self._rows = [
            (image.get("id"), image.get("file_name"), captions.get(image.get("id"), []))
            for image in _objects(path, tree, "images", "id")
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
            record = {"image_id": image_id, "image": name, "caption": captions}
            yield to_row(f"{self.path.name}: image_id {image_id}", record, _COCO)


def _objects(path: Path, tree: dict[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    """The objects in a list of a COCO file. Raises UserError for anything else, and for an invalid id."""
    for number, item in enumerate(tree[key]):
        if not isinstance(item, dict) or isinstance(item.get(name), (list, dict)):
            raise UserError(f"{path}: item {number} of {key!r} is not an object with {name!r}, as in COCO")
    return list(tree[key])
