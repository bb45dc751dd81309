"""Conditions and arithmetic on the values of samples, for `filter --where` and a recipe's ``data.where``.

    where = Expression("clip_score > 0.28 and (language == 'english' or not width < 200)", "--where")
    where.names                                          # ["clip_score", "language", "width"]
    where.holds({"clip_score": ..., ...})                # [n] bool

The grammar is a small part of Python's: comparisons (also 0.2 < a < 0.4), and, or, not, + - * /, numbers, column names,
and texts in quotes, which == and != compare. Nothing is executed: the tree that ``ast`` gives is walked.

Where a sample has no value (NaN, null, "", a division by zero), a comparison is neither true nor false (Kleene's logic,
as in SQL): the sample is left out unless the rest of the condition decides, so ``not a < 1`` leaves it out too.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.io.errors import UserError

Values = NDArray[Any] | list[Any]
"""One value per sample: an array of numbers, or a list of texts, numbers, and None."""
Mask = NDArray[np.bool_]

_LONGEST, _DEEPEST = 1000, 50
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: np.where(np.equal(b, 0), np.nan, np.divide(a, b)),
}


class Expression:
    """A parsed condition, or with ``condition=False`` a number. Raises UserError, which begins with ``option``, for
    anything else."""

    def __init__(self, text: str, option: str, condition: bool = True) -> None:
        self.text, self.option, self._where = text, option, f"{option} {text!r}"
        self.names: list[str] = []
        """The columns that it reads."""
        try:
            if len(text) > _LONGEST:
                raise self._error(f"longer than {_LONGEST} characters")
            self._tree = ast.parse(text.strip(), mode="eval").body
            (self._check_condition if condition else self._check_value)(self._tree, 0)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            example = "clip_score > 0.28 and width >= 128" if condition else "clip_score - 0.2"
            raise self._error(f'not understood; write it like "{example}", texts in quotes') from None
        if not self.names:
            raise self._error("names no column")

    def holds(self, columns: Mapping[str, Values]) -> Mask:
        """Whether the condition is true, for each sample [n]. Raises UserError for a column of the wrong kind."""
        true, _ = self._condition(self._tree, columns)
        return true

    def numbers(self, columns: Mapping[str, Values]) -> NDArray[np.float64]:
        """The number for each sample [n], NaN where it has none."""
        return np.asarray(self._value(self._tree, columns), np.float64)

    def _error(self, says: str) -> UserError:
        return UserError(f"{self._where[:200]}: {says}")

    def _check_condition(self, node: ast.expr, depth: int) -> None:
        self._check_depth(depth)
        match node:
            case ast.BoolOp(values=parts):
                for part in parts:
                    self._check_condition(part, depth + 1)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                self._check_condition(part, depth + 1)
            case ast.Compare(left=left, ops=ops, comparators=others):
                operands = [left, *others]
                texts = [one for one in operands if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                if texts and (len(operands) > 2 or len(texts) > 1 or not isinstance(ops[0], ast.Eq | ast.NotEq)):
                    raise self._error(f"a text is compared with one column, by == or !=, not {ast.unparse(node)!r}")
                for one, sign in zip(others, ops, strict=True):
                    if type(sign) not in _COMPARE:
                        raise self._error(f"{ast.unparse(one)!r} is compared with an operator that is not known here")
                for one in operands:
                    if one not in texts:
                        self._check_value(one, depth + 1)
                        if texts and _name(one) is None:
                            raise self._error(f"{ast.unparse(one)!r} is a number, not a column of texts")
            case _:
                raise self._error(
                    f"{ast.unparse(node)!r} is no condition: compare it with something, as in width >= 128"
                )

    def _check_value(self, node: ast.expr, depth: int) -> None:
        self._check_depth(depth)
        name = _name(node)
        match node:
            case _ if name is not None:
                self.names += [name] if name not in self.names else []
            case ast.Constant(value=int() | float() as value):
                float(value)  # an integer too large for it is not understood
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=part):
                self._check_value(part, depth + 1)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
                self._check_value(left, depth + 1)
                self._check_value(right, depth + 1)
            case _:
                raise self._error(f"{ast.unparse(node)!r} is neither a number, nor a column, nor + - * / of them")

    def _check_depth(self, depth: int) -> None:
        if depth > _DEEPEST:
            raise self._error(f"nested more than {_DEEPEST} deep")

    def _condition(self, node: ast.expr, columns: Mapping[str, Values]) -> tuple[Mask, Mask]:
        """(Where it is true, where it is false); neither where a value is missing."""
        match node:
            case ast.BoolOp(op=op, values=parts):
                trues, falses = zip(*(self._condition(part, columns) for part in parts), strict=True)
                if isinstance(op, ast.And):
                    return np.logical_and.reduce(trues), np.logical_or.reduce(falses)
                return np.logical_or.reduce(trues), np.logical_and.reduce(falses)
            case ast.UnaryOp(operand=part):
                true, false = self._condition(part, columns)
                return false, true
            case ast.Compare(left=left, ops=ops, comparators=others):
                pairs = zip([left, *others], ops, others, strict=False)
                found = [self._comparison(one, sign, other, columns) for one, sign, other in pairs]
                return (
                    np.logical_and.reduce([holds & known for holds, known in found]),
                    np.logical_or.reduce([~holds & known for holds, known in found]),
                )
        raise AssertionError(node)

    def _comparison(
        self, one: ast.expr, sign: ast.cmpop, other: ast.expr, columns: Mapping[str, Values]
    ) -> tuple[Mask, Mask]:
        """(What the comparison says, whether both values are there)."""
        compare = _COMPARE[type(sign)]
        for text, column in ((one, other), (other, one)):
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                values = self._texts(_name(column) or "", columns)
                known = np.fromiter((value is not None for value in values), np.bool_, len(values))
                return np.fromiter((compare(value, text.value) for value in values), np.bool_, len(values)), known
        left, right = self._value(one, columns), self._value(other, columns)
        length = len(next(iter(columns.values())))
        known = ~(np.isnan(left) | np.isnan(right))
        return np.broadcast_to(compare(left, right), length), np.broadcast_to(known, length)

    def _value(self, node: ast.expr, columns: Mapping[str, Values]) -> Any:
        """Numbers [n], or one for all; integers are compared as they are, all arithmetic is in float64."""
        name = _name(node)
        match node:
            case _ if name is not None:
                return self._numbers(name, columns)
            case ast.Constant(value=int() | float() as number):
                return np.float64(number) if isinstance(number, float) or abs(number) >= 2**63 else np.int64(number)
            case ast.UnaryOp(op=op, operand=part):
                value = np.asarray(self._value(part, columns), np.float64)
                return -value if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=sign, right=right):
                one, other = (np.asarray(self._value(part, columns), np.float64) for part in (left, right))
                with np.errstate(all="ignore"):
                    return _ARITHMETIC[type(sign)](one, other)
        raise AssertionError(node)

    def _numbers(self, name: str, columns: Mapping[str, Values]) -> NDArray[Any]:
        values = columns[name]
        if isinstance(values, np.ndarray):
            return values if values.dtype.kind in "iu" else values.astype(np.float64)
        numbers = np.array([as_number(value) for value in values], np.float64)
        if np.isnan(numbers).all() and any(isinstance(value, str) and value for value in values):
            raise self._error(
                f"the column {name!r} holds texts, such as {_example(values)!r}: compare it with a text in quotes"
            )
        return numbers

    def _texts(self, name: str, columns: Mapping[str, Values]) -> list[str | None]:
        values = columns[name]
        texts = [value if isinstance(value, str) and value else None for value in values]
        if not any(texts) and any(value is not None and not isinstance(value, str) for value in values):
            raise self._error(f"the column {name!r} holds numbers: compare it with a number, without quotes")
        return texts


def as_number(value: Any) -> float:
    """A number, or a text that reads as one; NaN for anything else."""
    if not isinstance(value, bool | int | float | str | np.number | np.bool_):
        return np.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return np.nan


def _example(values: list[Any]) -> str:
    return next(value for value in values if isinstance(value, str) and value)[:40]


def _name(node: ast.expr) -> str | None:
    """The column that a name, or names joined by dots, stands for."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _name(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None
