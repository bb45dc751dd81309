"""Keeps the samples that meet conditions. Writes a view: a dataset without tars of its own, whose indexes
point to the samples of DATASET that are kept. Nothing is copied, so DATASET must stay where it is.

    python -m data_tools filter DATASET OUT --where "similarity >= 0.28" --where "min_side >= 200"
    python -m data_tools filter DATASET OUT --best similarity --share 0.3
    python -m data_tools filter DATASET OUT --where "clip_score > 0.28 and not (width < 128 or aspect > 3)"
    python -m data_tools filter DATASET OUT --where "face == 'bold serif'" --where "caption ~ dogs?"

A name is a column of the .json members, a side-car column (see `join`), "caption", "key", or one of width, height,
min_side, aspect, image_bytes, caption_bytes and format. A condition is written as in a recipe's data.where:
comparisons, and, or, not, + - * /, numbers, names, and texts in quotes. NAME ~ PATTERN matches a regular expression
anywhere in the value. All conditions must hold; a sample without the value is dropped. --best then keeps the given
share of the remaining samples, those with the highest values.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.commands.arguments import Parser, add_processes, number
from data_tools.commands.merge import summary
from data_tools.format.expression import Expression, as_number
from data_tools.format.fields import values_of
from data_tools.format.map_shards import open_local
from data_tools.format.view import open_view, write_view
from data_tools.io.errors import UserError

_MATCHES = re.compile(r"\s*([^\s'\"]+)\s*~\s*(.*?)\s*")


class Matches:
    """ "caption ~ dogs?": whether a regular expression matches anywhere in the value. Raises UserError if it is not
    valid."""

    def __init__(self, name: str, pattern: str) -> None:
        self.names = [name]
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--where: {pattern!r} is not a valid regular expression ({error})") from None

    def holds(self, values: dict[str, list[Any]]) -> NDArray[np.bool_]:
        found = values[self.names[0]]
        return np.array([value is not None and self.pattern.search(str(value)) is not None for value in found], bool)


def parse_condition(text: str) -> Expression | Matches:
    """ "width >= 200". Raises UserError when it is not understood."""
    match = _MATCHES.fullmatch(text)
    return Matches(*match.groups()) if match else Expression(text, "--where")


def choose_best(values: list[Any], keep: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """The samples of ``keep`` whose values are among the highest ``share``; ties go to the earlier sample."""
    numbers = np.array([as_number(value) for value in values], np.float64)
    candidates = np.flatnonzero(keep & ~np.isnan(numbers))
    order = candidates[np.argsort(-numbers[candidates], kind="stable")]
    best = np.zeros(len(keep), bool)
    best[order[: round(share * int(keep.sum()))]] = True
    return best


def main(argv: list[str]) -> int | None:
    parser = Parser("filter", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="folder of shards, or a view")
    parser.add_argument("out", metavar="OUT", help="a new folder for the view")
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="may be repeated; all must hold"
    )
    parser.add_argument("--best", metavar="NAME", help="rank by this value, highest first")
    parser.add_argument("--share", type=number(0, 1), metavar="X", help="share of samples that --best keeps, 0 to 1")
    add_processes(parser)
    arguments = parser.parse_args(argv)
    if not arguments.where and not arguments.best:
        raise UserError("nothing to filter by: give --where or --best")
    if (arguments.best is None) != (arguments.share is None) or not 0 < (arguments.share or 1) <= 1:
        raise UserError("--best NAME and --share X go together, X above 0 and at most 1")
    dataset = open_local(arguments.dataset)
    output = open_view(arguments.out, dataset)
    conditions = [parse_condition(text) for text in arguments.where]
    names = [name for condition in conditions for name in condition.names]
    names = list(dict.fromkeys(names + ([arguments.best] if arguments.best else [])))
    values = values_of(dataset, names, arguments.processes)
    keep = np.ones(dataset.num_samples, bool)
    for condition in conditions:
        keep &= condition.holds(values)
    if arguments.best:
        keep = choose_best(values[arguments.best], keep, arguments.share)
    made_by: dict[str, Any] = {
        "command": "filter",
        "where": arguments.where,
        "best": arguments.best,
        "share": arguments.share,
    }
    manifest = write_view(output, dataset, keep, made_by)
    print(f"kept {int(keep.sum()):,} of {len(keep):,} | {summary(arguments.out, manifest)}", file=sys.stderr)
    return 0
