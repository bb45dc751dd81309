"""Writes one shard of a plan: reads and checks its rows, writes a tar, an index and a record of the rows left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.format.index import IMAGE_FORMATS, ROW, index_name
from data_tools.format.scan import hash_key
from data_tools.format.tar_writer import TarWriter
from data_tools.io.errors import UserError
from data_tools.io.files import synced_file
from data_tools.io.output import PARTS, Output
from data_tools.samples.captions import clean_all
from data_tools.samples.images import prepare
from data_tools.samples.reject import Reject, explain
from data_tools.sharding.counts import Reporter
from data_tools.sharding.plan import ShardPlan
from data_tools.sources.base import Row, Stored, read_image

RESERVED = ("captions", "sample")
"""Reserved names in the .json member; an input column of that name is stored as column_NAME."""


def write_shard(
    plan: ShardPlan, output: Output, shard: int, reporter: Reporter, strict: bool = False
) -> dict[str, Any]:
    """Writes shard number ``shard`` and returns its record. Raises UserError at the first reject if ``strict``."""
    name = plan.shard_name(shard)
    numbers = plan.rows_of(shard)
    local = output.scratch / f"{name}.tmp"
    writer = TarWriter(local)
    index = np.zeros(len(numbers), ROW)
    rejects: list[dict[str, Any]] = []
    kept, max_captions = 0, 1
    changed: Counter[str] = Counter()
    try:
        for number, row in zip(numbers.tolist(), plan.source.rows(numbers), strict=True):
            key = plan.key(number)
            try:
                entry, num_captions, num_bytes, changes = _write_sample(plan, writer, key, row)
            except Reject as reject:
                if strict:
                    words = explain(reject.reason, reject.path)
                    raise UserError(f"{row.source}: {words} ({reject.reason}; --strict stops at the first)") from None
                rejects.append({"key": key, "reason": reject.reason, "source": row.source})
                reporter.reject(rejects[-1], reject.path)
            else:
                index[kept] = entry
                kept += 1
                changed.update(changes)
                max_captions = max(max_captions, num_captions)
                reporter.image(num_bytes)
        reporter.flush()
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    about = {"max_captions": max_captions, "rejects": rejects, "changed": dict(sorted(changed.items()))}
    return _publish(output, name, local, writer, index[:kept], about)


def _publish(
    output: Output,
    name: str,
    local: Path,
    writer: TarWriter,
    index: Any,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Publishes the tar, then the index, then the record: if the record exists, the others are complete."""
    local_index = output.scratch / f"{index_name(name)}.tmp"
    with synced_file(local_index) as file:
        np.save(file, index, allow_pickle=False)
    output.publish(name, local)
    output.publish(index_name(name), local_index)
    entry = {"name": name, "samples": len(index), "bytes": writer.bytes, "digest": writer.digest}
    record = {"entry": entry, **about}
    output.write_json(f"{PARTS}/{name}.json", record)
    return record


def _write_sample(
    plan: ShardPlan, writer: TarWriter, key: str, row: Row
) -> tuple[tuple[int, ...], int, int, list[str]]:
    """(Its index row, number of captions, bytes read, changes of the image). All checks that may reject the row
    come before the first write."""
    if row.fault is not None:
        raise Reject(row.fault, row.detail)
    captions, cut = clean_all(list(row.captions), plan.options.max_caption)
    data = read_image(row, plan.image_root, plan.options.images.max_bytes)
    picture = prepare(data, plan.options.images)
    about: dict[str, Any] = {"source": row.source, "width": picture.width, "height": picture.height}
    if isinstance(row.image, str):
        about["image"] = row.image
    elif isinstance(row.image, Stored):
        about["image"] = row.image.name
    if picture.changed:
        about["changed"] = picture.changed
    if cut:
        about["caption_cut"] = True
    record = {(f"column_{name}" if name in RESERVED else name): value for name, value in row.columns.items()}
    if len(captions) > 1:
        record["captions"] = captions
    record["sample"] = about
    text = captions[0].encode()
    meta = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")
    entry = (
        writer.add(f"{key}.{picture.extension}", picture.data),
        len(picture.data),
        IMAGE_FORMATS[picture.extension],
        writer.add(f"{key}.txt", text),
        len(text),
        writer.add(f"{key}.json", meta),
        len(meta),
        hash_key(key),
        xxhash.xxh3_64_intdigest(picture.data),
        picture.width,
        picture.height,
    )
    return entry, len(captions), len(data), picture.changed
