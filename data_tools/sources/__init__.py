"""Readers of every input that `shard` knows; `open_source` finds the right one."""

from __future__ import annotations

import glob
from pathlib import Path

from data_tools.errors import DataError
from data_tools.sources.base import Problem, Row, Source, SourceOptions, read_image

__all__ = ["KINDS", "Problem", "Row", "Source", "SourceOptions", "open_source", "read_image"]

KINDS = ("csv", "tsv", "jsonl", "parquet", "arrow", "tars", "folder", "coco")
_SUFFIXES = {
    "csv": "csv",
    "tsv": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
    "arrow": "arrow",
    "tar": "tars",
    "json": "coco",
}


def open_source(path: str, kind: str | None, options: SourceOptions) -> Source:
    """The reader of an input, opened and counted. Raises DataError naming what is missing."""
    if "://" in path:
        raise DataError(f"{path}: the input is read from local files; copy it here first (its pictures may stay: --images URL)")
    paths = [Path(path)]
    if not paths[0].exists():
        paths = [Path(found) for found in sorted(glob.glob(path))]
        if not paths:
            raise DataError(f"{path}: no such file or folder")
    kind = kind or guess_kind(paths[0])
    if kind in ("parquet", "tars"):
        # Arrow takes a while to import and most runs do not need it.
        if paths[0].is_dir():
            pattern = "*.parquet" if kind == "parquet" else "*.tar"
            folder, paths = paths[0], sorted(paths[0].glob(pattern))
            if not paths:
                raise DataError(f"{folder}: no {pattern} in it")
        if kind == "parquet":
            from data_tools.sources.arrow import ParquetSource

            return ParquetSource(paths, options)
        from data_tools.sources.tars import TarSource

        return TarSource(paths, options)
    if len(paths) > 1:
        raise DataError(f"{path}: {len(paths)} files; of {kind} inputs only one can be read at a time: join them first")
    return _open_one(paths[0], kind, options)


def _open_one(path: Path, kind: str, options: SourceOptions) -> Source:
    if kind == "arrow":
        from data_tools.sources.arrow import ArrowSource

        return ArrowSource(path, options)
    if kind in ("folder", "coco"):
        from data_tools.sources.folders import CocoSource, FolderSource

        return FolderSource(path, options) if kind == "folder" else CocoSource(path, options)
    from data_tools.sources.tables import TableSource

    return TableSource(path, kind, options)


def guess_kind(path: Path) -> str:
    """The kind of input by its name, or by what a folder holds."""
    if not path.is_dir():
        kind = _SUFFIXES.get(path.suffix.lower().lstrip("."))
        if kind is None:
            raise DataError(f"{path}: the kind of input cannot be told from its name; say --input {'|'.join(KINDS)}")
        return kind
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise DataError(f"{path}: holds several splits ({splits}); name one: {path}/SPLIT")
    if (path / "state.json").is_file():
        return "arrow"
    if next(path.glob("*.tar"), None):
        return "tars"
    tables = list(path.glob("*.parquet"))
    # img2dataset's "files" output has a folder of pictures for every Parquet file of results.
    if tables and not all(table.with_suffix("").is_dir() for table in tables):
        return "parquet"
    return "folder"
