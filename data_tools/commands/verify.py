"""Checks a dataset against its manifest and names every damaged sample.

    python -m data_tools verify DATASET            # digests, counts, members, columns, and every image decoded
    python -m data_tools verify DATASET --quick    # digests and counts only

Prints one line per damaged item to stdout: SHARD (or the file of a joined column), KEY (or "-"), what is wrong. Exits
with 1 if there is any.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import numpy as np
import xxhash

from data_tools.commands.arguments import Parser, add_processes
from data_tools.format import tar_reader
from data_tools.format.index import Dataset
from data_tools.format.map_shards import TarReader, open_local, over_shards
from data_tools.format.scan import hash_key, read_key
from data_tools.io.errors import UserError
from data_tools.io.formatting import printable
from data_tools.samples.decoding import check
from data_tools.samples.reject import REASONS, Reject
from data_tools.sources.base import read_pieces

Damage = tuple[str, str]
"""(Key or "-", what is wrong)."""


def verify_shard(dataset: Dataset, quick: bool, shard: int) -> list[Damage]:
    """All damage in one shard; an empty list if it is sound."""
    path = dataset.tar_path(shard)
    entry = dataset.manifest["shards"][shard]
    try:
        rows = dataset.shard(shard)
    except UserError as error:
        return [("-", str(error))]
    if not os.path.exists(path):
        return [("-", "the tar is missing; fetch or write this shard again")]
    digest = xxhash.xxh3_64()
    for piece in read_pieces(path):
        digest.update(piece)
    changed = digest.hexdigest() != entry["digest"]
    if quick and not changed:
        return []
    found: list[Damage] = []
    with TarReader(path) as tar:
        for row in rows:
            found += [(key, fault) for key, fault in _check_sample(tar, row, not quick)]
    if changed:
        problems: list[tar_reader.TarProblem] = []
        for _ in tar_reader.walk(path, problems):
            pass
        found += [("-", f"{REASONS[problem.reason]} (byte {problem.offset})") for problem in problems]
        size = os.path.getsize(path)
        found.append(
            (
                "-",
                f"the tar's digest is {digest.hexdigest()}, the manifest says {entry['digest']} ({size} of "
                f"{entry['bytes']} bytes)",
            )
        )
    return found


def verify_columns(dataset: Dataset) -> list[tuple[str, str]]:
    """(File, what is wrong) for side-car columns that cannot be read or do not have one value per sample."""
    found = []
    for name in dataset.columns:
        file = dataset.manifest["columns"][name]["file"]
        try:
            values = dataset.column(name)
        except UserError as error:
            found.append((file, str(error)))
            continue
        if len(values) != dataset.num_samples:
            found.append((file, f"{len(values)} values for {dataset.num_samples} samples; join it again"))
    return found


def _check_sample(tar: TarReader, row: np.void, decode: bool) -> list[Damage]:
    key = read_key(tar.descriptor, row)
    if hash_key(key) != int(row["key_hash"]):
        return [
            (key or "-", f"its header is damaged or not where the index says (image at byte {row['image_offset']})")
        ]
    image = tar.read(row, "image")
    if len(image) != int(row["image_size"]) or xxhash.xxh3_64_intdigest(image) != int(row["digest"]):
        return [(key, "the image's bytes have changed")]
    faults = []
    try:
        tar.read(row, "text").decode("utf-8")
    except UnicodeDecodeError:
        faults.append((key, "its caption is not UTF-8"))
    try:
        json.loads(tar.read(row, "json") or b"{}")
    except ValueError:
        faults.append((key, "its .json member is not JSON"))
    if decode:
        try:
            check(image)
        except Reject as reject:
            faults.append((key, REASONS[reject.reason]))
    return faults


def main(argv: list[str]) -> int | None:
    parser = Parser("verify", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="folder of shards, or a view")
    parser.add_argument(
        "--quick", action="store_true", help="compare digests and counts; check samples only where these differ"
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    dataset = open_local(arguments.dataset)
    total = 0
    work = partial(verify_shard, dataset, arguments.quick)
    for shard, found in enumerate(over_shards(work, dataset.num_shards, arguments.processes)):
        total += len(found)
        for key, fault in found:
            print(printable(f"{dataset.manifest['shards'][shard]['name']}\t{key}\t{fault}"))
    for file, fault in verify_columns(dataset):
        total += 1
        print(printable(f"{file}\t-\t{fault}"))
    state = f"{total} damages" if total else "sound"
    print(
        f"{arguments.dataset}: {dataset.num_samples:,} samples in {dataset.num_shards} shards: {state}", file=sys.stderr
    )
    return 1 if total else 0
