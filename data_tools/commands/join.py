"""Adds side-car columns, one value per sample, without rewriting the tars.

    python -m data_tools join DATASET scores.parquet --on uid --columns similarity,recaption
    python -m data_tools join DATASET embeddings.npy --name teacher          # [num_samples, d], in sample order

Rows of the table (CSV, TSV, JSONL or Parquet) are matched to samples by their column --on, whose values are compared
with --with of each sample ("key" by default, or any column of the .json members). A sample without a row gets NaN or
"". `Dataset.column(NAME)`, `filter` and `cat` read the joined values. Use it for scores, new captions or a teacher's
embeddings.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.commands.arguments import Parser, add_processes
from data_tools.format.columns import amended_columns
from data_tools.format.fields import values_of
from data_tools.format.index import Dataset, load_array
from data_tools.format.map_shards import open_local
from data_tools.format.view import write_column
from data_tools.io.errors import UserError
from data_tools.io.output import Output
from data_tools.sources.base import refuse_twice

csv.field_size_limit(2**31 - 1)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Column name -> values, of a CSV, TSV, JSONL or Parquet file. Raises UserError when it cannot be read."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return dict(pq.read_table(path).to_pydict())
        if suffix in (".csv", ".tsv"):
            rows = _read_csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix in (".jsonl", ".ndjson"):
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        else:
            raise UserError(f"{path}: unknown kind of table; convert it to .csv, .tsv, .jsonl, .parquet or .npy")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable ({' '.join(str(error).split())[:200]})") from None
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    """Its rows as dicts. As in `shard`, a carriage return inside a field does not end the row."""
    rows = []
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            refuse_twice(str(path), list(reader.fieldnames or ()))
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path}: line {reader.reader.line_num} has more fields than the header has names; fix that "
                        "line"
                    )
                rows.append(row)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.reader.line_num} is not readable ({error}); fix that line") from None
    return rows


def as_column(values: list[Any], where: str) -> NDArray[Any] | list[str]:
    """Values (None where missing) -> integers, floats (NaN where missing), rows of floats, or texts ("" where
    missing)."""
    given = [value for value in values if value is not None]
    if any(isinstance(value, list) for value in given):
        widths = {len(value) if isinstance(value, list) else -1 for value in given}
        if len(widths) > 1:
            raise UserError(f"{where}: lists of different lengths ({sorted(widths)[:4]})")
        blank = [np.nan] * widths.pop()
        return np.array([blank if value is None else value for value in values], np.float32)
    if all(isinstance(value, bool | int) for value in given) and len(given) == len(values):
        return np.array(values, np.int64)
    try:
        return np.array([np.nan if value is None or value == "" else float(value) for value in values], np.float64)
    except (TypeError, ValueError):
        return [
            "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]


def match(keys: list[Any], table: dict[str, list[Any]], on: str) -> NDArray[np.int64]:
    """The table row for each sample's key [num_samples], -1 where there is none; the last of several rows."""
    rows = {str(value): row for row, value in enumerate(table[on])}
    return np.fromiter((rows.get(str(key), -1) for key in keys), np.int64, len(keys))


def main(argv: list[str]) -> int | None:
    parser = Parser("join", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="folder of shards, or a view")
    parser.add_argument("table", metavar="TABLE")
    parser.add_argument("--on", metavar="COLUMN", help="column of the table that identifies the sample")
    parser.add_argument(
        "--with", metavar="NAME", default="key", dest="key", help='field of the sample to match it with (default "key")'
    )
    parser.add_argument("--columns", metavar="A,B,...", help="columns to join (default: all others)")
    parser.add_argument("--name", metavar="NAME", help="column name for a .npy file (default: its file name)")
    add_processes(parser)
    arguments = parser.parse_args(argv)
    dataset = open_local(arguments.dataset)
    path = Path(arguments.table)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    columns: dict[str, NDArray[Any] | list[str]] = {}
    matched = dataset.num_samples
    if path.suffix == ".npy":
        columns[arguments.name or path.stem] = _array(path, dataset.num_samples)
    else:
        table = read_table(path)
        if arguments.on is None:
            raise UserError(
                f"{path}: which column identifies the sample? Add --on COLUMN; there are: {', '.join(table)}"
            )
        wanted = arguments.columns.split(",") if arguments.columns else [name for name in table if name != arguments.on]
        unknown = [name for name in [arguments.on, *wanted] if name not in table]
        if unknown:
            raise UserError(f"{path}: no column {unknown[0]!r} (--on, --columns); there are: {', '.join(table)}")
        rows = match(values_of(dataset, [arguments.key], arguments.processes)[arguments.key], table, arguments.on)
        matched = int((rows >= 0).sum())
        if not matched:
            raise UserError(
                f"{path}: no value of {arguments.on!r} is the {arguments.key!r} of a sample; see `python -m "
                f"data_tools cat`"
            )
        for name in wanted:
            columns[name] = as_column(
                [table[name][row] if row >= 0 else None for row in rows.tolist()], f"{path}: column {name!r}"
            )
    bad = [name for name in columns if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".")]
    if bad:
        raise UserError(f"{path}: {bad[0]!r} cannot be a file name; rename the column")
    _add(dataset, columns)
    print(
        f"{arguments.dataset}: joined {', '.join(columns)} for {matched:,} of {dataset.num_samples:,} samples",
        file=sys.stderr,
    )
    return 0


def _add(dataset: Dataset, columns: dict[str, NDArray[Any] | list[str]]) -> None:
    output = Output(dataset.root)
    with amended_columns(dataset) as entries:
        output.start()
        entries |= {name: write_column(output, name, values) for name, values in columns.items()}
        output.finish()


def _array(path: Path, num_samples: int) -> NDArray[Any]:
    try:
        values = load_array(str(path))
    except ValueError as error:
        raise UserError(f"{path}: not a .npy file ({error}); write it with numpy.save") from None
    if values.ndim == 0 or values.shape[0] != num_samples:
        raise UserError(f"{path}: shape {values.shape}, but the dataset has {num_samples} samples, one row each")
    return values
