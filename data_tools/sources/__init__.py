"""Readers of every input that `shard` knows; `open_source` finds the right one."""

from __future__ import annotations

import glob
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.io.errors import UserError
from data_tools.samples.reject import REASONS
from data_tools.sources.base import Problem, Row, Source, SourceOptions, is_web_address, read_image
from data_tools.sources.unpacked import stem_of, unpack
from data_tools.sources.web import fetch_first, list_of_addresses

__all__ = ["KINDS", "Problem", "Row", "Source", "SourceOptions", "open_source", "read_image"]

KINDS = ("csv", "tsv", "jsonl", "parquet", "arrow", "tars", "zip", "folder", "coco")
_SUFFIXES = {
    "csv": "csv",
    "tsv": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
    "arrow": "arrow",
    "tar": "tars",
    "zip": "zip",
    "json": "coco",
}
_TEXT = ("csv", "tsv", "jsonl")
_ARCHIVES = ("zip", "tar", "tgz", "tzst", "tbz2")
_FIRST = 20
"""Rows that are checked before a run begins, to find a wrong column early."""


_NO_ROWS = {
    "csv": "a header line and no rows below it; for a table without a header use --columns A,B,...",
    "jsonl": "no line with anything in it",
    "parquet": "a table without rows",
    "arrow": "a table without rows",
    "tars": "no complete sample in it: an image with KEY.txt or KEY.json",
    "zip": "no images in it",
    "folder": "no images in it, nor in the folders below",
    "coco": 'its list of "images" is empty',
}


def open_source(path: str, kind: str | None, options: SourceOptions) -> Source:
    """The reader of an input, opened and counted. Raises UserError if the input is missing, has no rows, or if its
    first rows show that a column is the wrong one."""
    if "://" in path:
        raise UserError(
            f"{path}: the input must be local; copy it here first (its images may stay remote: --images URL)"
        )
    paths, inner = [Path(path)], ""
    if not paths[0].exists():
        paths = [Path(found) for found in sorted(glob.glob(path))]
        if not paths:
            archive, inner = _inside_archive(Path(path))
            paths = [archive]
    kind = kind or guess_kind(paths[0])
    if kind in ("tars", "coco") and options.image is not None:
        what = {"tars": "tars", "coco": "COCO captions"}[kind]
        raise UserError(
            f"{path}: --image names a column of a table, and this is {what}; leave it out, or name the table"
        )
    source = _open(path, paths, kind, options, inner)
    if not sum(source.blocks):
        raise UserError(f"{path}: {_NO_ROWS['csv' if kind == 'tsv' else kind]}{_hint(paths[0], source)}")
    _check_first(path, kind, source, options)
    return source


def _inside_archive(path: Path) -> tuple[Path, str]:
    """pets.zip/train -> (pets.zip, "train/"). Raises UserError where there is no such file."""
    for parent in path.parents:
        if parent.is_file() and parent.suffix.lower().lstrip(".") in _ARCHIVES:
            return parent, path.relative_to(parent).as_posix() + "/"
    raise UserError(f"{path}: no such file or folder")


def _check_first(path: str, kind: str, source: Source, options: SourceOptions) -> None:
    """Raises UserError if the first rows show that a column does not have the expected kind of values, or that images
    are on the web; warns if captions are numbers."""
    rows = list(islice(source.rows(np.arange(min(_FIRST, sum(source.blocks)))), _FIRST))
    told = next((row for row in rows if row.image or row.fault in ("caption_type", "image_type")), None)
    if told and told.fault:
        raise UserError(f"{path}: {told.detail}")
    if told and is_web_address(told.image):
        caption = options.captions[0] if options.captions else "caption"
        raise UserError(fetch_first(Path(path), kind, options.image or "url", caption, str(told.image)))
    captions = [caption for row in rows for caption in row.captions if caption]
    if options.captions and len(captions) > 1 and all(map(_is_number, captions)):
        names = ", ".join(options.captions)
        print(
            f"{path}: WARNING: the captions ({names}) are numbers: {', '.join(captions[:3])} ...; is that the right "
            f"column? --caption-template 'a photo of {{{options.captions[0]}}}' makes sentences of them",
            file=sys.stderr,
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _hint(path: Path, source: Source) -> str:
    """A hint what an input without rows may be."""
    if path.is_dir():
        tables = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower().lstrip(".") in _SUFFIXES)
        return (
            f"; it holds tables, name one of them: {', '.join(tables[:3])}{' ...' if len(tables) > 3 else ''}"
            if tables
            else ""
        )
    first = next(iter(source.problems), None)
    return f"; the first of what is wrong with it: {REASONS[first.reason]} ({first.source})" if first else ""


def _open(path: str, paths: list[Path], kind: str, options: SourceOptions, inner: str) -> Source:
    if kind in ("parquet", "tars", "zip"):
        if paths[0].is_dir():
            patterns = {"parquet": ["*.parquet"], "tars": ["*.tar", "*.tar.*", "*.tgz"], "zip": ["*.zip"]}[kind]
            folder = paths[0]
            paths = sorted(found for pattern in patterns for found in folder.glob(pattern))
            if not paths:
                raise UserError(f"{folder}: no {patterns[0]} in it")
        for entry in paths:
            if entry.is_dir():
                raise UserError(f"{entry}: a folder among the {kind}; rename it or move it away")
        return _open_tree(paths, kind, options, inner) if kind != "parquet" else _open_parquet(paths, options)
    if len(paths) > 1:
        if kind not in _TEXT:
            raise UserError(f"{path}: {len(paths)} files; of {kind} inputs only one can be read at a time")
        from data_tools.sources.several import Several

        return Several([_open_table(one, kind, options) for one in paths])
    if paths[0].is_dir() and kind not in ("folder", "arrow"):
        raise UserError(f"{path}: a folder; name the {kind} file in it")
    if paths[0].is_file() and kind == "folder":
        raise UserError(f"{path}: a file, not a folder of images; remove --input folder")
    return _open_one(paths[0], kind, options)


def _open_one(path: Path, kind: str, options: SourceOptions) -> Source:
    if kind == "arrow":
        from data_tools.sources.arrow import ArrowSource

        return ArrowSource(path, options)
    if kind == "folder":
        return _open_tree([path], kind, options, "")
    if kind == "coco":
        from data_tools.sources.folders import CocoSource

        return CocoSource(path, options)
    return _open_table(path, kind, options)


def _open_table(path: Path, kind: str, options: SourceOptions, caption_names: tuple[str, ...] = ()) -> Source:
    if kind == "parquet":
        return _open_parquet([path], options, caption_names)
    from data_tools.sources.tables import TableSource

    return TableSource(path, kind, options, caption_names)


def _open_parquet(paths: list[Path], options: SourceOptions, caption_names: tuple[str, ...] = ()) -> Source:
    from data_tools.sources.arrow import ParquetSource  # Arrow takes a while to import and most runs do not need it

    return ParquetSource(paths, options, caption_names)


def _open_tree(paths: list[Path], kind: str, options: SourceOptions, inner: str) -> Source:
    """Images with something beside them: a folder, zips or tars."""
    from data_tools.sources.folders import FolderSource, is_pair_part
    from data_tools.sources.several import TABLES, MetadataSource, is_metadata, tables_in
    from data_tools.sources.tars import TarSource
    from data_tools.sources.trees import FolderTree, TarTree, Tree, ZipTree

    tree: Tree
    if kind == "folder":
        tree = FolderTree(paths[0], lambda name: is_pair_part(name) or is_metadata(name))
    elif kind == "zip":
        tree = ZipTree(paths, lambda name: is_pair_part(name) or name.rpartition(".")[2].lower() in TABLES, inner)
    else:
        copies = [unpack(one) for one in paths]
        paths = [copy.path if copy else one for copy, one in zip(copies, paths, strict=True)]
        if not (options.templates or inner):
            pairs = TarSource(paths, options, copies)
            if sum(pairs.blocks):
                return pairs
        tree = TarTree(paths, lambda name: is_pair_part(name) or is_metadata(name), inner, copies)
        if not (options.templates or inner or tables_in(tree, options)):
            return pairs
    tables = tables_in(tree, options)
    return MetadataSource(tree, tables, options, _open_table) if tables else FolderSource(tree, options)


def guess_kind(path: Path) -> str:
    """The kind of input by its name, or by what a folder holds."""
    if not path.is_dir():
        suffix = Path(stem_of(path)).suffix.lower().lstrip(".")
        kind = _SUFFIXES.get(suffix)
        if suffix == "txt":
            raise UserError(list_of_addresses(path))
        if suffix in ("xlsx", "xls", "ods"):
            raise UserError(f"{path}: a spreadsheet; save it as CSV (in Excel: CSV UTF-8) and shard the CSV file")
        if kind is None or (kind not in (*_TEXT, "tars") and stem_of(path) != path.name):
            raise UserError(f"{path}: its name does not tell the kind of input; add --input {'|'.join(KINDS)}")
        return kind
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise UserError(f"{path}: holds several splits ({splits}); name one: {path}/SPLIT")
    if (path / "state.json").is_file():
        return "arrow"
    for pattern, kind in (("*.tar", "tars"), ("*.tar.*", "tars"), ("*.tgz", "tars"), ("*.zip", "zip")):
        if next(path.glob(pattern), None):
            return kind
    tables = [table for table in path.glob("*.parquet") if table.name != "metadata.parquet"]
    # img2dataset's "files" output has a folder of images beside every Parquet file of results.
    if tables and not all(table.with_suffix("").is_dir() for table in tables):
        return "parquet"
    return "folder"
