"""Prints samples.

    python -m data_tools cat DATASET                         # the first three
    python -m data_tools cat DATASET 17 00000123 --show      # by sample number or key; images drawn in the terminal
    python -m data_tools cat DATASET 17 --save DIR           # as files

A number of 8 or more digits is a key, a shorter one a sample number.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from PIL import Image

from data_tools.commands.arguments import Parser
from data_tools.format.index import Dataset
from data_tools.format.map_shards import Place, TarReader, open_local
from data_tools.format.scan import hash_key, read_key
from data_tools.io.errors import UserError
from data_tools.io.formatting import printable
from data_tools.io.output import make_folder
from data_tools.samples.decoding import decode
from data_tools.samples.reject import Reject

_EXTENSIONS = {1: "jpg", 2: "png", 3: "webp", 0: "image"}


def find(dataset: Dataset, name: str) -> Place:
    """A sample by number or key. Raises UserError when there is none."""
    if name.isdigit() and len(name) < 8:
        if int(name) >= dataset.num_samples:
            raise UserError(f"{dataset.root}: no sample {name}; they are 0 .. {dataset.num_samples - 1}")
        shard, row = dataset.locate(np.array([int(name)]))
        return Place(int(shard[0]), int(row[0]))
    wanted = hash_key(name)
    for number in range(dataset.num_shards):
        found = np.flatnonzero(dataset.shard(number)["key_hash"] == np.uint64(wanted))
        if found.size:
            return Place(number, int(found[0]))
    raise UserError(f"{dataset.root}: no sample with the key {name!r}")


def draw(image: bytes, width: int) -> str:
    """An image as two pixels a character, in 24-bit terminal colours."""
    pixels = Image.fromarray(decode(image))
    height = max(2, round(pixels.height * width / pixels.width / 2) * 2)
    small = np.asarray(pixels.resize((width, height), Image.Resampling.LANCZOS))
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = [
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*above, *below)
            for above, below in zip(upper.tolist(), lower.tolist(), strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def describe(dataset: Dataset, place: Place, show: bool, save: str | None) -> str:
    """The sample as text; with ``save``, its members are written to that folder."""
    row = dataset.shard(place.shard)[place.row]
    with TarReader(dataset.tar_path(place.shard)) as tar:
        image, text, meta = (tar.read(row, kind) for kind in ("image", "text", "json"))
        key = read_key(tar.descriptor, row)
    extension = _EXTENSIONS[int(row["image_format"])]
    number = int(dataset.counts[place.shard]) + place.row
    name = dataset.manifest["shards"][place.shard]["name"]
    lines = [
        f"sample {number}  {name}  {key}.{extension}  {int(row['width'])} x {int(row['height'])}  {len(image):,} bytes"
    ]
    lines.append(f"  caption  {text.decode('utf-8', 'replace')}")
    lines += [
        f"  {column}  {json.dumps(value, ensure_ascii=False)}" for column, value in json.loads(meta or b"{}").items()
    ]
    for column in dataset.columns:
        value = dataset.column(column)[number]
        lines.append(
            f"  {column}  {value if isinstance(value, str) else np.array2string(np.asarray(value), threshold=8)}  "
            f"(joined)"
        )
    lines = [printable(line) for line in lines]
    if show:
        try:
            lines.append(draw(image, 64))
        except Reject as reject:
            lines.append(f"  the image cannot be drawn: {reject.reason}")
    if save:
        folder = make_folder(save)
        stem = key.replace("/", "_")
        for suffix, data in ((extension, image), ("txt", text), ("json", meta)):
            (folder / f"{stem}.{suffix}").write_bytes(data)
    return "\n".join(lines)


def main(argv: list[str]) -> int | None:
    parser = Parser("cat", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="folder of shards, or a view")
    parser.add_argument("samples", metavar="SAMPLE", nargs="*", help="sample numbers or keys (default: 0 1 2)")
    parser.add_argument("--show", action="store_true", help="draw the images in the terminal")
    parser.add_argument("--save", metavar="DIR", help="write the members as files")
    arguments = parser.parse_args(argv)
    dataset = open_local(arguments.dataset)
    names = arguments.samples or [str(number) for number in range(min(3, dataset.num_samples))]
    for name in names:
        print(describe(dataset, find(dataset, name), arguments.show, arguments.save))
    sys.stdout.flush()
    return 0
