"""Writes image-text pairs into webdataset tars with an index and a manifest.

    python -m data_tools shard pairs.csv OUT --image image --caption caption --processes 8
    python -m data_tools shard pairs.csv OUT --image image --caption caption --resize 224
    python -m data_tools shard pets.zip OUT --caption-template "a photo of a {class}"      # folders are classes
    python -m data_tools shard pairs.csv OUT --image image --caption caption --task 3/16   # `merge OUT` completes it

data_tools/README.md lists the inputs.

OUT then contains 00000.tar ... (KEY.jpg|png|webp, KEY.txt, KEY.json), 00000.idx ..., rejects.jsonl (every row that was
left out, with the reason) and, written last, manifest.json. Their bytes depend on the input and the options only, not
on --processes or --task. To continue a run that was stopped or killed, start it again with the same options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from data_tools.commands.merge import PLAN, REJECTS, merge, record_of, reopen_if_damaged, summary
from data_tools.commands.shard_arguments import make_parser, options_of
from data_tools.format.index import MANIFEST
from data_tools.io.errors import UserError
from data_tools.io.output import Output
from data_tools.io.remote import require_backend
from data_tools.samples.reject import explain
from data_tools.sharding.counts import Tally
from data_tools.sharding.plan import ShardPlan
from data_tools.sharding.progress import EXAMPLES, ShardProgress
from data_tools.sharding.ray import shard_on_ray
from data_tools.sharding.workers import write_shards
from data_tools.sources import open_source

_FEW = 1000
"""Rows to read before --max-rejected is judged."""


def make_plan(arguments: argparse.Namespace) -> ShardPlan:
    """Opens the input and plans the shards."""
    options = options_of(arguments)
    source = open_source(arguments.pairs, arguments.input, options.source)
    if arguments.images and "://" in arguments.images:
        require_backend(arguments.images)
    pairs = Path(arguments.pairs)
    root = arguments.images or str(pairs if pairs.is_dir() else pairs.parent)
    return ShardPlan(source, options, root, pairs.name)


def refuse_other(plan: ShardPlan, output: Output) -> None:
    """Raises UserError if a run with another plan was begun here: its shards must not be mixed with these."""
    found = output.read_json(PLAN)
    if found is None:
        if output.size(MANIFEST) is not None:
            raise UserError(f"{output.root}: another dataset is there; choose another folder, or remove it")
    elif found["plan"] != plan.hash:
        if (
            output.size(MANIFEST) is None and output.take_back()
        ):  # left by a run that wrote no sample, most likely for a mistake that is corrected now
            output.remove(PLAN)
            return
        raise UserError(
            f"{output.root}: begun with {_difference(found, plan)}; use the same, or another folder, or remove this one"
        )


def _difference(found: dict[str, object], plan: ShardPlan) -> str:
    mine = plan.describe()
    if found["input"] != mine["input"]:
        return "another input"
    flat_found, flat_mine = _flatten(found["options"]), _flatten(mine["options"])
    changed = [
        f"{key}={flat_found.get(key)!r} (now {value!r})"
        for key, value in flat_mine.items()
        if str(flat_found.get(key)) != str(value)
    ]
    return ", ".join(changed) or "another version of this tool"


def _flatten(tree: object) -> dict[str, object]:
    assert isinstance(tree, dict)
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value)
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def run(plan: ShardPlan, output: Output, task: tuple[int, int], arguments: argparse.Namespace) -> None:
    """Writes the shards that this task has not finished yet."""
    index, count = task
    mine = list(range(index, plan.num_shards, count))
    records = {shard: record_of(output, plan.shard_name(shard)) for shard in mine}
    todo = [shard for shard in mine if records[shard] is None]
    rows = {shard: min(plan.options.shard_size, plan.num_rows - shard * plan.options.shard_size) for shard in mine}
    done = sum(rows[shard] for shard in mine if shard not in todo)
    before = [line for record in records.values() if record for line in record["rejects"]]
    earlier = Counter(line["reason"] for line in before)
    progress = ShardProgress(sum(rows.values()), done, arguments.quiet)

    def hear(tally: Tally) -> None:
        progress.add_tally(tally)
        counts, seen = progress.rejected + earlier, progress.seen + done
        if seen >= min(_FEW, progress.total) and counts.total() > arguments.max_rejected * seen:
            raise UserError(_refusal(arguments.pairs, output, counts, seen, (before + progress.examples)[:EXAMPLES]))

    write_shards(plan, output, todo, arguments.processes, arguments.strict, hear)
    progress.close()


def _refusal(pairs: str, output: Output, counts: Counter[str], seen: int, lines: list[dict[str, str]]) -> str:
    """The error for too many rejected rows: the counts, and one example of the most common reason."""
    output.write(
        REJECTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
    )
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = next((line for line in lines if line["reason"] == counts.most_common(1)[0][0]), lines[0])
    example = f"{first['source']}, key {first['key']}: {explain(first['reason'], first.get('path'))}"
    named = f"{output.root}/{REJECTS} names " + (
        "them" if counts.total() <= len(lines) else f"the first {len(lines):,}"
    )
    return (
        f"{pairs}: {counts.total()} of {seen} rows cannot be used ({reasons}); fix them, or raise "
        f"--max-rejected; {named} ({example})"
    )


def run_task(arguments: argparse.Namespace) -> Output:
    """Runs one task; any number of tasks may run at the same time, on any machines."""
    plan = make_plan(arguments)
    output = Output(arguments.out)
    refuse_other(plan, output)
    output.start()
    with output.locked("{}-of-{}".format(*arguments.task)):
        reopen_if_damaged(output)
        if output.read_json(MANIFEST) is None:
            if output.read_json(PLAN) is None:
                output.write_json(PLAN, plan.describe())
            run(plan, output, arguments.task, arguments)
        else:
            output.finish()
    return output


def main(argv: list[str]) -> int | None:
    arguments = make_parser(__doc__).parse_args(argv)
    if arguments.ray:
        shard_on_ray(arguments)
        output = Output(arguments.out)
    else:
        output = run_task(arguments)
    index, count = arguments.task
    if count > 1:
        print(
            f"task {index} of {count} is done; when all are: python -m data_tools merge {arguments.out}",
            file=sys.stderr,
        )
        return 0
    print(summary(arguments.out, merge(output)), file=sys.stderr)
    return 0
