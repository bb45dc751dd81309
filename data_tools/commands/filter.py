"""Keeps the samples that meet conditions. Writes a view: a dataset without tars of its own, whose indexes
point to the samples of DATASET that are kept. Nothing is copied, so DATASET must stay where it is.

    python -m data_tools filter DATASET OUT --where "similarity >= 0.28" --where "min_side >= 200"
    python -m data_tools filter DATASET OUT --best similarity --share 0.3
    python -m data_tools filter DATASET OUT --where "face == bold serif"

A name is a column of the .json members, a side-car column (see `join`), "caption", "key", or one of width, height,
min_side, aspect, image_bytes, caption_bytes and format. Operators: == != >= <= > < and ~ (matches a regular expression
anywhere in the value). All conditions must hold; a sample without the value is dropped. --best then keeps the given
share of the remaining samples, those with the highest values.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.commands.arguments import Parser, add_processes, number
from data_tools.commands.merge import summary
from data_tools.format.fields import values_of
from data_tools.format.map_shards import open_local
from data_tools.format.view import open_view, write_view
from data_tools.io.errors import UserError

_CONDITION = re.compile(r"\s*(\S+)\s*(==|!=|>=|<=|>|<|~)\s*(.*?)\s*")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def parse_condition(text: str) -> tuple[str, Callable[[Any], bool]]:
    """ "width >= 200" -> (name, test of a value). Raises UserError when it is not understood."""
    match = _CONDITION.fullmatch(text)
    if not match:
        raise UserError(
            f'--where {text!r}: not understood; write it as "NAME OPERATOR VALUE", for example "width >= 200"'
        )
    name, sign, value = match.groups()
    if sign == "~":
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise UserError(f"--where {text!r}: {value!r} is not a valid regular expression ({error})") from None
        return name, lambda found: pattern.search(str(found)) is not None
    compare = _COMPARE[sign]
    number = _number(value)
    if number is None and sign not in ("==", "!="):
        raise UserError(f"--where {text!r}: {value!r} is not a number, and {sign} compares numbers")

    def test(found: Any) -> bool:
        if number is not None and (as_number := _number(found)) is not None:
            return compare(as_number, number)
        return compare(str(found), value) if sign in ("==", "!=") else False

    return name, test


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def choose_best(values: list[Any], keep: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """The samples of ``keep`` whose values are among the highest ``share``; ties go to the earlier sample."""
    numbers = np.array([_number(value) if _number(value) is not None else np.nan for value in values], np.float64)
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
    names = list(dict.fromkeys([name for name, _ in conditions] + ([arguments.best] if arguments.best else [])))
    values = values_of(dataset, names, arguments.processes)
    keep = np.ones(dataset.num_samples, bool)
    for name, test in conditions:
        keep &= np.fromiter((value is not None and test(value) for value in values[name]), bool, len(keep))
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
