"""Writes the index and the manifest for tars written by any tool, or rebuilds a lost index.

    python -m data_tools index FOLDER

It walks the tar headers itself: members may be in any order, and damage costs only the samples it touches, not those
behind it. Writes NAME.idx beside each NAME.tar, then rejects.jsonl (what was left out and why) and, last,
manifest.json. The tars are not changed. Side-car columns are kept if the keys and images are the same, in the same
order; a message names the columns that are dropped.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.commands.arguments import Parser, add_processes
from data_tools.commands.merge import REJECTS, summary
from data_tools.format.columns import Entries, note_change, still_true
from data_tools.format.index import FORMAT, MANIFEST, VERSION, check_names, index_name
from data_tools.format.map_shards import TarReader, over_shards
from data_tools.format.scan import scan_tar
from data_tools.io.errors import UserError
from data_tools.io.output import Output
from data_tools.samples.image_header import read_header
from data_tools.samples.reject import Reject
from data_tools.sources.base import hash_text, read_pieces


class Scan(NamedTuple):
    """The content of one tar."""

    entry: dict[str, Any]
    max_captions: int
    rejects: list[dict[str, Any]]
    rows: NDArray[np.void]


def scan(paths: list[Path], names: list[str], shard: int) -> Scan:
    """Index rows of one tar, with sizes in pixels; images whose header cannot be read are left out."""
    path, name = paths[shard], names[shard]
    rows, problems = scan_tar(path)
    rejects = [
        {"key": item.name, "reason": item.reason, "source": f"{name}@{item.offset}", "shard": shard}
        for item in problems
    ]
    sound = np.ones(len(rows), bool)
    max_captions = 1
    with TarReader(str(path)) as tar:
        for number, row in enumerate(rows):
            try:
                header = read_header(tar.read(row, "image"))
            except Reject as reject:
                sound[number] = False
                rejects.append(
                    {
                        "key": "",
                        "reason": reject.reason,
                        "source": f"{name}@{row['image_offset'] - 512}",
                        "shard": shard,
                    }
                )
                continue
            if max(header.width, header.height) < 65536:
                row["width"], row["height"] = header.width, header.height
            max_captions = max(max_captions, _num_captions(tar.read(row, "json")))
    digest = xxhash.xxh3_64()
    for piece in read_pieces(path):
        digest.update(piece)
    entry = {"name": name, "samples": int(sound.sum()), "bytes": path.stat().st_size, "digest": digest.hexdigest()}
    return Scan(entry, max_captions, rejects, rows[sound])


def _num_captions(meta: bytes) -> int:
    if b'"captions"' not in meta:
        return 1
    try:
        captions = json.loads(meta).get("captions")
    except (ValueError, AttributeError):
        return 1
    return len(captions) if isinstance(captions, list) else 1


def _tars(folder: Path, manifest: dict[str, Any] | None) -> tuple[list[Path], list[str]]:
    """(Paths, names) of the tars: those of the manifest where there is one, else all in the folder."""
    found = sorted(folder.glob("*.tar"))
    folders = [str(path) for path in found if path.is_dir()]
    if folders:
        raise UserError(f"{folders[0]}: a folder with the name of a tar; rename it or move it away")
    if manifest is not None:
        check_names(f"{folder}/{MANIFEST}", manifest)
    if manifest is None:
        return found, [path.name for path in found]
    paths = [folder / entry.get("path", entry["name"]) for entry in manifest["shards"]]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such file, but {MANIFEST} names it; restore it, or remove {MANIFEST} to index what "
            f"is there"
        )
    if any("path" in entry for entry in manifest["shards"]):
        raise UserError(
            f"{folder}: a view of another dataset has no tars of its own; run the command that wrote the view again"
        )
    names = [entry["name"] for entry in manifest["shards"]]
    new = sorted({path.name for path in found} - set(names))
    if new:
        some = ", ".join(new[:5]) + (" ..." if len(new) > 5 else "")
        remedy = f"to index every tar in the folder, remove {MANIFEST} (and join its columns again)"
        print(
            f"{folder}: skipped {len(new)} tars that {MANIFEST} does not name: {some}; {remedy}",
            file=sys.stderr,
        )
    return paths, names


def main(argv: list[str]) -> int | None:
    parser = Parser("index", __doc__)
    parser.add_argument("folder", metavar="FOLDER", help="local folder with .tar files")
    add_processes(parser)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a local folder of tars")
    output = Output(str(folder))
    old = output.read_json(MANIFEST)
    if old is not None and old.get("format") != FORMAT:
        raise UserError(f"{folder}/{MANIFEST}: written by another tool; rename it")
    paths, names = _tars(folder, old)
    if not paths:
        raise UserError(f"{folder}: no .tar files in it")
    output.start()
    entries, lines, max_captions = [], [], 1
    for shard, found in enumerate(over_shards(partial(scan, paths, names), len(paths), arguments.processes)):
        note_change(output, old, shard, found.rows)
        buffer = io.BytesIO()
        np.save(buffer, found.rows, allow_pickle=False)
        output.write(index_name(found.entry["name"]), buffer.getvalue())
        entries.append(found.entry)
        lines += found.rejects
        max_captions = max(max_captions, found.max_captions)
    rejects = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
    empty = [entry["name"] for entry in entries if not entry["samples"]]
    if len(empty) == len(entries):
        output.write(REJECTS, rejects)
        for name in names if old is None else ():
            output.remove(index_name(name))
        output.finish()
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in Counter(line["reason"] for line in lines).most_common(3))
            or "empty"
        )
        sample = "a sample is KEY.jpg|png|webp with KEY.txt or KEY.json"
        raise UserError(
            f"{folder}: no complete sample in {len(names)} tars ({reasons}; {REJECTS} names them); {sample}; fetch "
            f"them again"
        )
    if empty:
        some = ", ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
        print(
            f"{folder}: no complete sample in {len(empty)} of {len(names)} tars: {some}; {REJECTS} says why",
            file=sys.stderr,
        )
    manifest = old
    if manifest is None or manifest["shards"] != entries:
        manifest = _manifest(entries, lines, max_captions, still_true(output, old))
        output.write(REJECTS, rejects)
        output.write_json(MANIFEST, manifest)
    output.finish()
    print(summary(str(folder), manifest), file=sys.stderr)
    return 0


def _manifest(
    entries: list[dict[str, Any]], lines: list[dict[str, Any]], max_captions: int, columns: Entries
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan": hash_text("index", entries),
        "shards": entries,
        "samples": sum(entry["samples"] for entry in entries),
        "max_captions": max_captions,
        "rejected": dict(sorted(Counter(line["reason"] for line in lines).items())),
        **({"columns": columns} if columns else {}),
    }
