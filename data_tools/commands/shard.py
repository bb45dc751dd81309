"""Writes image-text pairs into webdataset tars with an index and a manifest.

    python -m data_tools shard pairs.csv OUT --image image --caption caption --processes 8
    python -m data_tools shard pairs.csv OUT --image image --caption caption --resize 224
    python -m data_tools shard pets.zip OUT --caption-template "a photo of a {class}"      # folders are classes
    python -m data_tools shard pairs.csv OUT --image image --caption caption --task 3/16   # `merge OUT` completes it

data_tools/README.md lists the inputs.

OUT then contains 00000.tar ... (KEY.jpg|png|webp, KEY.txt, KEY.json), 00000.idx ..., rejects.jsonl (every row that was
left out, with the reason) and, written last, manifest.json. Their bytes depend on the input and the options only, not
on
--processes or --task. To continue a run that was stopped or killed, start it again with the same options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from data_tools.commands.arguments import Parser, add_processes, number, whole
from data_tools.commands.merge import PLAN, REJECTS, merge, record_of, reopen_if_damaged, summary
from data_tools.format.index import MANIFEST
from data_tools.io.errors import UserError
from data_tools.io.output import Output
from data_tools.io.remote import require_backend
from data_tools.samples.formats import NEVER, ON_REQUEST
from data_tools.samples.images import ImageOptions
from data_tools.samples.reject import explain
from data_tools.sharding.counts import Tally
from data_tools.sharding.plan import ShardOptions, ShardPlan
from data_tools.sharding.progress import EXAMPLES, ShardProgress
from data_tools.sharding.ray import shard_on_ray
from data_tools.sharding.workers import write_shards
from data_tools.sources import KINDS, SourceOptions, open_source

_FEW = 1000
"""Rows to read before --max-rejected is judged."""


def make_parser() -> argparse.ArgumentParser:
    """All options of the command."""
    parser = Parser("shard", __doc__)
    parser.add_argument("pairs", metavar="PAIRS", help="the input")
    parser.add_argument("out", metavar="OUT", help="folder, or any URL that fsspec writes to (s3://, gs://, ...)")
    _add_input(parser.add_argument_group("input"))
    _add_pictures(parser.add_argument_group("pictures"))
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--shard-size", type=whole(1), default=5000, metavar="N", help="input rows per shard (default 5000)"
    )
    group.add_argument("--seed", type=whole(0), default=0, metavar="S", help="seed of the order of samples (default 0)")
    group.add_argument("--keep-order", action="store_true", help="keep the order of the input instead of permuting it")
    group.add_argument(
        "--max-caption",
        type=whole(1),
        default=4096,
        metavar="N",
        help="cut captions after N characters (default 4096)",
    )
    group = parser.add_argument_group("running (these do not change what is written)")
    add_processes(group)
    group.add_argument(
        "--task",
        type=_task,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th shard only, beginning with shard I (0 .. N - 1); `merge` completes the run",
    )
    group.add_argument(
        "--ray", type=whole(1), metavar="N", help="run N tasks on a Ray cluster (pip install ray) and merge them"
    )
    group.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    group.add_argument(
        "--max-rejected",
        type=number(0, 1),
        default=0.5,
        metavar="SHARE",
        help="stop when more than this share of rows is left out (default 0.5)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress line")
    return parser


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image", metavar="COLUMN", help="column with the picture's path, URL or bytes")
    group.add_argument(
        "--caption",
        metavar="COLUMN",
        action="append",
        default=[],
        help="column with the caption, or a list of them; may be repeated. d.en reaches into a struct or JSON",
    )
    group.add_argument(
        "--caption-template",
        metavar="TEXT",
        action="append",
        default=[],
        help="make captions: {NAME} is a column, {class} the folder of a picture; may be repeated",
    )
    group.add_argument("--input", choices=KINDS, help="kind of PAIRS, if its name does not tell")
    group.add_argument("--columns", metavar="A,B,...", help="names of the columns of a table without a header line")
    group.add_argument("--delimiter", metavar="C", help="separates the fields of a CSV or TSV file (default: detected)")
    group.add_argument(
        "--encoding",
        metavar="NAME",
        help="encoding of a CSV, TSV or JSONL file (default: UTF-8, or its byte-order mark)",
    )
    group.add_argument(
        "--no-quotes",
        action="store_true",
        help="read double quotes in a CSV or TSV file as ordinary characters",
    )
    group.add_argument(
        "--images",
        metavar="DIR",
        help="folder or URL that relative paths start from (default: the folder of PAIRS)",
    )


def _add_pictures(group: argparse._ArgumentGroup) -> None:
    defaults = ImageOptions()
    group.add_argument(
        "--resize",
        type=whole(1),
        metavar="PIXELS",
        help="shrink pictures to this side, never enlarge (default: keep the bytes of sound pictures)",
    )
    group.add_argument(
        "--resize-mode",
        choices=("shorter", "longer", "crop"),
        default="shorter",
        help="the side that --resize sets; crop cuts out the centre square (default shorter)",
    )
    group.add_argument(
        "--filter",
        choices=("hamming", "bicubic", "lanczos"),
        default=defaults.filter,
        help=f"filter of --resize, fastest first; most models' image processors use bicubic "
        f"(default {defaults.filter})",
    )
    group.add_argument(
        "--encode",
        choices=("auto", "jpg", "png", "webp"),
        default="auto",
        help="format of pictures that must be re-encoded (default auto: PNG if the input was lossless, else JPEG)",
    )
    group.add_argument(
        "--quality",
        type=whole(1, 100),
        default=defaults.quality,
        metavar="Q",
        help=f"JPEG and WebP quality of those (default {defaults.quality})",
    )
    group.add_argument(
        "--min-side",
        type=whole(1),
        default=defaults.min_side,
        metavar="N",
        help=f"leave out pictures with a shorter side (default {defaults.min_side})",
    )
    group.add_argument(
        "--max-aspect",
        type=number(1),
        default=defaults.max_aspect,
        metavar="X",
        help=f"leave out pictures with an aspect ratio beyond X:1 (default {defaults.max_aspect:g})",
    )
    group.add_argument(
        "--max-pixels",
        type=whole(1),
        default=defaults.max_pixels,
        metavar="N",
        help=f"leave out pictures of more pixels, by their header (default {defaults.max_pixels})",
    )
    group.add_argument(
        "--formats",
        type=_formats,
        default=(),
        metavar="A,B,...",
        help=f"also read rare formats: {', '.join(ON_REQUEST)}",
    )
    group.add_argument(
        "--icc",
        choices=("ignore", "srgb"),
        default=defaults.icc,
        help="srgb converts pictures with another colour profile, such as Display P3 or a CMYK one; ignore reads the "
        f"values as image processors of pretrained models do (default {defaults.icc})",
    )
    group.add_argument(
        "--max-memory",
        type=whole(64),
        default=defaults.max_memory,
        metavar="MIB",
        help="leave out pictures of unusual formats or more than 25 million pixels whose decoding takes more memory "
        f"(default {defaults.max_memory})",
    )
    group.add_argument(
        "--max-seconds",
        type=number(0.1),
        default=defaults.max_seconds,
        metavar="S",
        help=f"and those that take more processor time (default {defaults.max_seconds:g})",
    )
    group.add_argument(
        "--max-bytes",
        type=whole(1),
        default=defaults.max_bytes,
        metavar="N",
        help=f"leave out larger files (default {defaults.max_bytes})",
    )


def _task(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(index), int(count)


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(sorted({name.upper() for name in text.split(",")}))
    for name in names:
        if name in NEVER:
            raise argparse.ArgumentTypeError(f"{name} is never read: {NEVER[name]}")
        if name not in ON_REQUEST:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(ON_REQUEST)}")
    return names


def options_of(arguments: argparse.Namespace) -> ShardOptions:
    """The options that decide the bytes written."""
    columns = tuple(arguments.columns.split(",")) if arguments.columns else ()
    delimiter = {"tab": "\t", "\\t": "\t"}.get(arguments.delimiter, arguments.delimiter)
    source = SourceOptions(
        image=arguments.image,
        captions=tuple(arguments.caption),
        columns=columns,
        quotes=not arguments.no_quotes,
        images=arguments.images,
        templates=tuple(arguments.caption_template),
        delimiter=delimiter,
        encoding=arguments.encoding,
    )
    images = ImageOptions(
        resize=arguments.resize,
        resize_mode=arguments.resize_mode,
        filter=arguments.filter,
        encode=arguments.encode,
        quality=arguments.quality,
        min_side=arguments.min_side,
        max_aspect=arguments.max_aspect,
        max_pixels=arguments.max_pixels,
        max_bytes=arguments.max_bytes,
        formats=arguments.formats,
        icc=arguments.icc,
        max_memory=arguments.max_memory,
        max_seconds=arguments.max_seconds,
    )
    return ShardOptions(
        source, images, arguments.shard_size, arguments.seed, not arguments.keep_order, arguments.max_caption
    )


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
    arguments = make_parser().parse_args(argv)
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
