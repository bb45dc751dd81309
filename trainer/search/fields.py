"""Filters by a field of the samples' .json. The values of a field are read once, when it is first used.

fields = Fields(dataset)
fields.mask("face", "*serif*")                                              # [n] bool
"""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from contextlib import suppress
from fnmatch import translate
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.format.fields import FROM_INDEX, values_of
from data_tools.format.index import Dataset, Strings
from trainer.core.types import UserError

COMPARISON = re.compile(r"\s*(>=|<=|>|<)\s*(-?[\d.]+(?:e-?\d+)?)\s*", re.IGNORECASE)
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
LISTED = 200
"""Values of a field that are suggested, most frequent first."""


class Fields:
    """The fields of one dataset by name. Thread-safe."""

    def __init__(self, dataset: Dataset, names: list[str]) -> None:
        columns = [name for name in dataset.columns if _single(dataset, name)]
        self.names = list(dict.fromkeys([*names, *columns, "width", "height"]))
        """Fields of the .json members, side-car columns of `ringlip join`, and fields of the index."""
        self._dataset, self._lock = dataset, Lock()
        self._read = lru_cache(maxsize=16)(self._values)
        self.mask = lru_cache(maxsize=64)(self._mask)

    def common(self, name: str) -> list[tuple[str, int]]:
        """The most frequent values of a field with their counts."""
        distinct, codes = self._of(name)
        counts: Counter[str] = Counter()
        for value, count in zip(distinct, np.bincount(codes, minlength=len(distinct)).tolist(), strict=True):
            for text in _texts(value):
                counts[text] += count
        return counts.most_common(LISTED)

    def _mask(self, name: str, wanted: str) -> NDArray[np.bool_]:
        """[n] True for samples whose value matches: ignoring case, with `*` as wildcard, or `>=0.5` for numbers; a list
        matches if any item does. Raises UserError for an unknown field."""
        distinct, codes = self._of(name)
        compared = COMPARISON.fullmatch(wanted)
        if compared:
            compare, bound = OPERATORS[compared[1]], float(compared[2])
            hit = [any(bool(compare(number, bound)) for number in _numbers(value)) for value in distinct]
        else:
            pattern = re.compile(translate(wanted.strip().casefold().replace("[", "[[]")))
            hit = [any(pattern.match(text.casefold()) for text in _texts(value)) for value in distinct]
        return np.array(hit, bool)[codes]

    def _of(self, name: str) -> tuple[list[Any], NDArray[np.int64]]:
        if name not in self.names and name not in FROM_INDEX:
            raise UserError(f"no sample has a field {name!r}; there are: {', '.join(self.names)}")
        with self._lock:  # concurrent requests read a field once
            return self._read(name)

    def _values(self, name: str) -> tuple[list[Any], NDArray[np.int64]]:
        """The distinct values, and the position in them of each sample's value [n]."""
        numbers: dict[str, int] = {}
        distinct: list[Any] = []
        codes = np.empty(self._dataset.num_samples, np.int64)
        for sample, value in enumerate(values_of(self._dataset, [name], processes=1)[name]):
            text = json.dumps(value, sort_keys=True)
            if text not in numbers:
                numbers[text] = len(distinct)
                distinct.append(value)
            codes[sample] = numbers[text]
        return distinct, codes


def _texts(value: Any) -> list[str]:
    """A value as text; the items of a list one by one."""
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if value is None:
        return []
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]


def _numbers(value: Any) -> list[float]:
    """The numbers in a value, including numeric text (CSV files have no types)."""
    found = []
    for text in _texts(value):
        with suppress(ValueError):
            found.append(float(text))
    return found


def _single(dataset: Dataset, name: str) -> bool:
    """Whether a side-car column has one value per sample."""
    column = dataset.column(name)
    return isinstance(column, Strings) or column.ndim == 1
