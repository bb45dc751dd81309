"""Several tables as one input, and tables inside a tree of images: Hugging Face's imagefolder (metadata.jsonl, .csv
or .parquet), or one table in an archive."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.io.errors import UserError
from data_tools.sources.base import Problem, Row, Source, SourceOptions, hash_text
from data_tools.sources.folders import refuse_splits
from data_tools.sources.trees import FolderTree, Tree

TABLES = ("csv", "tsv", "jsonl", "parquet")
CAPTIONS = ("text", "caption")
"""Caption columns of an imagefolder if --caption is not given."""


class Several:
    """Sources of one kind, concatenated."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.columns = sources[0].columns
        self.classes = sources[0].classes if all(one.classes == sources[0].classes for one in sources) else []
        self.problems: list[Problem] = [problem for source in sources for problem in source.problems]
        self.blocks = [size for source in sources for size in source.blocks]
        self._edges = np.concatenate([[0], np.cumsum([sum(source.blocks) for source in sources])]).astype(np.int64)

    def fingerprint(self) -> str:
        return hash_text([source.fingerprint() for source in self.sources])

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        which = np.searchsorted(self._edges, numbers, side="right") - 1
        parts = {
            source: self.sources[source].rows(numbers[which == source] - self._edges[source])
            for source in np.unique(which).tolist()
        }
        for source in which.tolist():
            yield self._finish(source, next(parts[source]))

    def _finish(self, source: int, row: Row) -> Row:
        return row


class MetadataSource(Several):
    """Tables in a tree of images. Paths start from each table's folder, or from --images in the tree."""

    def __init__(self, tree: Tree, names: list[str], options: SourceOptions, open_table: Callable[..., Source]) -> None:
        refuse_splits(tree, names)
        self.tree, self._names, self._images = tree, names, options.images
        own = replace(options, image=options.image or "file_name", images=None)
        self._kept: list[Any] = []
        sources = []
        for name in names:
            path, kept = tree.local(name)
            self._kept.append(kept)
            try:
                sources.append(open_table(path, name.rpartition(".")[2].lower(), own, CAPTIONS))
            except UserError as error:
                raise UserError(str(error).replace(str(path), f"{tree.path}/{name}")) from None
        super().__init__(sources)
        self.problems = tree.problems + self.problems
        self._known = set(tree.names)

    def fingerprint(self) -> str:
        return hash_text(self.tree.fingerprint(), super().fingerprint())

    def _finish(self, source: int, row: Row) -> Row:
        if not isinstance(row.image, str) or not row.image or "://" in row.image:
            return row
        folder = posixpath.dirname(self._names[source])
        if isinstance(self.tree, FolderTree):  # files are opened when read, below --images if given
            row.image = row.image if self._images else posixpath.join(folder, row.image)
            return row
        name = posixpath.normpath(posixpath.join(folder, self._images or "", row.image.replace("\\", "/")))
        if name in self._known:
            row.image = self.tree.picture(name)
            return row
        return Row(row.source, None, [], fault="file_missing", detail=name)


def tables_in(tree: Tree, options: SourceOptions) -> list[str]:
    """The tables in ``tree``: every metadata.*, or with --image the only table of an archive."""
    tables = [name for name in tree.names if name.rpartition(".")[2].lower() in TABLES]
    metadata = [name for name in tables if is_metadata(name)]
    if metadata or options.image is None or isinstance(tree, FolderTree):
        return metadata
    if len(tables) > 1:
        raise UserError(f"{tree.path}: has {len(tables)} tables ({', '.join(tables[:3])} ...); unpack it and name one")
    return tables


def is_metadata(name: str) -> bool:
    """Whether a file name is that of an imagefolder's table."""
    stem, _, suffix = Path(name).name.lower().partition(".")
    return stem == "metadata" and suffix in TABLES
