"""The options of `python -m data_tools shard`, and what they mean for a plan."""

from __future__ import annotations

import argparse
from dataclasses import fields

from data_tools.commands.arguments import Parser, add_processes, number, whole
from data_tools.samples.formats import NEVER, ON_REQUEST
from data_tools.samples.images import ImageOptions
from data_tools.sharding.plan import ShardOptions
from data_tools.sources import KINDS, SourceOptions


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """All options of the command."""
    parser = Parser("shard", about)
    parser.add_argument("pairs", metavar="PAIRS", help="the input")
    parser.add_argument("out", metavar="OUT", help="folder, or any URL that fsspec writes to (s3://, gs://, ...)")
    _add_input(parser.add_argument_group("input"))
    _add_images(parser.add_argument_group("images"))
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
    group.add_argument("--image", metavar="COLUMN", help="column with the image's path, URL or bytes")
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
        help="make captions: {NAME} is a column, {class} the folder of an image; may be repeated",
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


def _add_images(group: argparse._ArgumentGroup) -> None:
    defaults = ImageOptions()
    group.add_argument(
        "--resize",
        type=whole(1),
        metavar="PIXELS",
        help="shrink images to this side, never enlarge (default: keep the bytes of sound images)",
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
        help="format of images that must be re-encoded (default auto: PNG if the input was lossless, else JPEG)",
    )
    group.add_argument(
        "--quality",
        type=whole(1, 100),
        default=defaults.quality,
        metavar="Q",
        help=f"JPEG and WebP quality of re-encoded images (default {defaults.quality})",
    )
    group.add_argument(
        "--min-side",
        type=whole(1),
        default=defaults.min_side,
        metavar="N",
        help=f"leave out images with a side of less than N pixels (default {defaults.min_side})",
    )
    group.add_argument(
        "--max-aspect",
        type=number(1),
        default=defaults.max_aspect,
        metavar="X",
        help=f"leave out images with an aspect ratio beyond X:1 (default {defaults.max_aspect:g})",
    )
    group.add_argument(
        "--max-pixels",
        type=whole(1),
        default=defaults.max_pixels,
        metavar="N",
        help=f"leave out images of more than N pixels, as their header states (default {defaults.max_pixels})",
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
        help="srgb converts images with another colour profile, such as Display P3 or a CMYK one; ignore reads the "
        f"values as image processors of pretrained models do (default {defaults.icc})",
    )
    group.add_argument(
        "--max-memory",
        type=whole(64),
        default=defaults.max_memory,
        metavar="MIB",
        help="leave out images of unusual formats or of more than 25 million pixels that need more memory to decode "
        f"(default {defaults.max_memory})",
    )
    group.add_argument(
        "--max-seconds",
        type=number(0.1),
        default=defaults.max_seconds,
        metavar="S",
        help=f"leave out such images that need more CPU time to decode (default {defaults.max_seconds:g})",
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
    # Every option of the group "images" is named as the field it sets.
    images = ImageOptions(**{field.name: getattr(arguments, field.name) for field in fields(ImageOptions)})
    return ShardOptions(
        source, images, arguments.shard_size, arguments.seed, not arguments.keep_order, arguments.max_caption
    )
