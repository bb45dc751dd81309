"""Completes a dataset whose shards were written by several tasks (`shard --task I/N`). Run it once all have finished.

    python -m data_tools merge OUT

It checks that every shard is there, and names those that are missing; then it writes rejects.jsonl (the rows that any
task left out) and, last, manifest.json, without which OUT cannot be read as a dataset. No image is copied. `shard`
without --task does the same at its end. If OUT is complete already, nothing changes; columns added by `join` are kept
when a missing shard has been written again.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from data_tools.commands.arguments import Parser
from data_tools.format.columns import put_aside, taken_up
from data_tools.format.index import FORMAT, MANIFEST, VERSION, check_names, index_name
from data_tools.io.errors import UserError
from data_tools.io.output import PARTS, Output

PLAN = "plan.json"
REJECTS = "rejects.jsonl"
CLASSES = "classnames.txt"
"""One class per line, in the order of "cls" in the .json members; zero-shot evaluation reads it."""


def record_of(output: Output, name: str) -> dict[str, Any] | None:
    """The record of a finished shard; None if the shard must be written."""
    record = output.read_json(f"{PARTS}/{name}.json")
    if record is None or output.size(name) != record["entry"]["bytes"] or output.size(index_name(name)) is None:
        return None
    return dict(record)


def reopen_if_damaged(output: Output) -> None:
    """Removes the manifest if a shard it names is missing or has another size, so that a rerun writes that shard again.

    The records of the sound shards are restored from the manifest and rejects.jsonl; its columns are set aside.
    """
    manifest = output.read_json(MANIFEST)
    if manifest is None:
        return
    check_names(f"{output.root}/{MANIFEST}", manifest)
    names = [entry["name"] for entry in manifest["shards"]]
    damaged = {
        entry["name"]
        for entry in manifest["shards"]
        if output.size(entry["name"]) != entry["bytes"] or output.size(index_name(entry["name"])) is None
    }
    if not damaged:
        return
    print(f"{output.root}: writing again what is missing or cut: {', '.join(sorted(damaged))}", file=sys.stderr)
    rejects: dict[int, list[dict[str, Any]]] = {}
    for line in output.read_text(REJECTS).split("\n")[
        :-1
    ]:  # splitlines() would also split at U+2028 and others, which a name may contain
        reject = json.loads(line)
        if "shard" in reject:
            rejects.setdefault(reject.pop("shard"), []).append(reject)
    for number, (name, entry) in enumerate(zip(names, manifest["shards"], strict=True)):
        if name not in damaged:
            record = {"entry": entry, "max_captions": manifest["max_captions"], "rejects": rejects.get(number, [])}
            record["changed"] = manifest.get("changed", {}).get(name, {})
            output.write_json(f"{PARTS}/{name}.json", record)
    put_aside(output, manifest)
    output.remove(MANIFEST)


def merge(output: Output) -> dict[str, Any]:
    """Writes the manifest of a finished run and returns it. Raises UserError naming the shards that are missing."""
    plan = output.read_json(PLAN)
    if plan is None:
        raise UserError(f"{output.root}/{PLAN}: no such file; run `python -m data_tools shard` first")
    manifest = output.read_json(MANIFEST)
    if manifest is not None and manifest.get("plan") == plan["plan"]:
        output.finish()
        return dict(manifest)
    if manifest is not None:
        remedy = (
            "there is nothing to merge; `python -m data_tools verify` checks it; to shard again, use another folder"
        )
        raise UserError(
            f"{output.root}: complete, but its tars were changed and indexed after `shard` wrote them: {remedy}"
        )
    names = [f"{shard:05d}.tar" for shard in range(plan["shards"])]
    records = [record_of(output, name) for name in names]
    missing = [name for name, record in zip(names, records, strict=True) if record is None]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise UserError(
            f"{output.root}: {len(missing)} of {len(names)} shards are missing ({some}); run their `shard --task` again"
        )
    whole = [record for record in records if record is not None]
    lines = plan["problems"] + [
        {**line, "shard": number} for number, record in enumerate(whole) for line in record["rejects"]
    ]
    rejected = Counter(line["reason"] for line in lines)
    changed = {record["entry"]["name"]: record["changed"] for record in whole if record.get("changed")}
    shards = [record["entry"] for record in whole]
    columns = taken_up(output, shards)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan["plan"],
        "shards": shards,
        "samples": sum(entry["samples"] for entry in shards),
        "max_captions": max(record["max_captions"] for record in whole),
        "rejected": dict(sorted(rejected.items())),
        **({"changed": changed} if changed else {}),
        "input": plan["input"],
        "options": plan["options"],
        **({"columns": columns} if columns else {}),
    }
    output.write(
        REJECTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
    )
    if plan.get("classes"):
        output.write(CLASSES, "".join(f"{name}\n" for name in plan["classes"]).encode("utf-8", "replace"))
    output.write_json(MANIFEST, manifest)
    output.finish()
    return manifest


def summary(root: str, manifest: dict[str, Any]) -> str:
    """One line for the terminal."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in manifest["rejected"].items()) or "none"
    changes = [item for counts in manifest.get("changed", {}).values() for item in counts.items()]
    mended = sum(count for name, count in changes if name.startswith("mended_"))
    note = f"; harmless faults mended in {mended:,} JPEGs" if mended else ""
    size = sum(entry["bytes"] for entry in manifest["shards"])
    return (
        f"{root}: {manifest['samples']:,} samples in {len(manifest['shards'])} shards, {size / 1e6:,.1f} MB; "
        f"left out: {rejected}{note}"
    )


def main(argv: list[str]) -> int | None:
    parser = Parser("merge", __doc__)
    parser.add_argument("out", metavar="OUT", help="folder or fsspec URL that the tasks wrote to")
    arguments = parser.parse_args(argv)
    print(summary(arguments.out, merge(Output(arguments.out))), file=sys.stderr)
    return 0
