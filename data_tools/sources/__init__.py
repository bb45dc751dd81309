"""Readers of every input that `shard` knows; `open_source` finds the right one."""

from __future__ import annotations

import glob
from pathlib import Path

from data_tools.io.errors import UserError
from data_tools.samples.reject import REASONS
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


_NO_ROWS = {
    "csv": "a header line and no rows below it; for a table without a header say --columns A,B,...",
    "jsonl": "no line with anything in it",
    "parquet": "a table without rows",
    "arrow": "a table without rows",
    "tars": "no whole sample in it: a picture with KEY.txt or KEY.json",
    "folder": "no pictures in it, nor in the folders below",
    "coco": 'its list of "images" is empty',
}


def open_source(path: str, kind: str | None, options: SourceOptions) -> Source:
    """The reader of an input, opened and counted. Raises UserError naming what is missing, or the input that has no
    rows."""
    if "://" in path:
        raise UserError(
            f"{path}: the input is read from local files; copy it here first (its pictures may stay: --images URL)"
        )
    paths = [Path(path)]
    if not paths[0].exists():
        paths = [Path(found) for found in sorted(glob.glob(path))]
        if not paths:
            raise UserError(f"{path}: no such file or folder")
    kind = kind or guess_kind(paths[0])
    if kind in ("tars", "folder", "coco") and options.image is not None:
        what = {"tars": "tars", "folder": "a folder of pictures", "coco": "COCO captions"}[kind]
        raise UserError(
            f"{path}: --image names a column of a table, and this is {what}; leave it out, or name the table"
        )
    source = _open(path, paths, kind, options)
    if not sum(source.blocks):
        raise UserError(f"{path}: {_NO_ROWS['csv' if kind == 'tsv' else kind]}{_hint(paths[0], source)}")
    return source


def _hint(path: Path, source: Source) -> str:
    """What an input without rows may be instead."""
    if path.is_dir():
        tables = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower().lstrip(".") in _SUFFIXES)
        return (
            f"; it holds tables, name one of them: {', '.join(tables[:3])}{' ...' if len(tables) > 3 else ''}"
            if tables
            else ""
        )
    first = next(iter(source.problems), None)
    return f"; the first of what is wrong with it: {REASONS[first.reason]} ({first.source})" if first else ""


def _open(path: str, paths: list[Path], kind: str, options: SourceOptions) -> Source:
    if kind in ("parquet", "tars"):
        # Arrow takes a while to import and most runs do not need it.
        if paths[0].is_dir():
            pattern = "*.parquet" if kind == "parquet" else "*.tar"
            folder, paths = paths[0], sorted(paths[0].glob(pattern))
            if not paths:
                raise UserError(f"{folder}: no {pattern} in it")
        for entry in paths:
            if entry.is_dir():
                raise UserError(f"{entry}: a folder among the {kind}; rename it or move it away")
        if kind == "parquet":
            from data_tools.sources.arrow import ParquetSource

            return ParquetSource(paths, options)
        from data_tools.sources.tars import TarSource

        return TarSource(paths, options)
    if len(paths) > 1:
        raise UserError(f"{path}: {len(paths)} files; of {kind} inputs only one can be read at a time: join them first")
    if paths[0].is_dir() and kind not in ("folder", "arrow"):
        raise UserError(f"{path}: a folder; name the {kind} file in it")
    if paths[0].is_file() and kind == "folder":
        raise UserError(f"{path}: a file, not a folder of pictures; leave --input folder out")
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
            raise UserError(f"{path}: the kind of input cannot be told from its name; say --input {'|'.join(KINDS)}")
        return kind
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise UserError(f"{path}: holds several splits ({splits}); name one: {path}/SPLIT")
    if (path / "state.json").is_file():
        return "arrow"
    if next(path.glob("*.tar"), None):
        return "tars"
    tables = list(path.glob("*.parquet"))
    # img2dataset's "files" output has a folder of pictures for every Parquet file of results.
    if tables and not all(table.with_suffix("").is_dir() for table in tables):
        return "parquet"
    return "folder"
