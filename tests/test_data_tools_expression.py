"""Conditions: the same as Python's own where all values are there, Kleene's logic where they are not, and nothing else
is understood."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from data_tools.format.expression import Expression
from data_tools.io.errors import UserError

N = 60


def random_columns(choose: random.Random, missing: bool) -> dict[str, Any]:
    def number() -> float:
        return choose.choice([float("nan") if missing else 0.0, choose.randint(-4, 4), choose.uniform(-2, 2)])

    return {
        "whole": np.array([choose.randint(-4, 4) for _ in range(N)]),
        "score": np.array([number() for _ in range(N)], np.float32),
        "a.b": np.array([number() for _ in range(N)]),
        "mixed": [choose.choice([None if missing else 1, 2, "3", -1.5]) for _ in range(N)],
        "word": [choose.choice(["" if missing else "red", "red", "blue"]) for _ in range(N)],
    }


def random_value(choose: random.Random, depth: int) -> str:
    if depth == 0 or choose.random() < 0.3:
        return choose.choice(["whole", "score", "a.b", "mixed", "2", "0.5", "-1", "3"])
    if choose.random() < 0.2:
        return f"(-{random_value(choose, depth - 1)})"
    return f"({random_value(choose, depth - 1)} {choose.choice('+-*/')} {random_value(choose, depth - 1)})"


def random_condition(choose: random.Random, depth: int) -> str:
    kind = choose.random() if depth else 1.0
    if kind < 0.4:
        parts = [random_condition(choose, depth - 1) for _ in range(choose.choice([2, 3]))]
        return "(" + choose.choice([" and ", " or "]).join(parts) + ")"
    if kind < 0.55:
        return f"(not {random_condition(choose, depth - 1)})"
    if kind < 0.65:
        return f"(word {choose.choice(['==', '!='])} 'red')"
    values = [random_value(choose, 2) for _ in range(choose.choice([2, 2, 3]))]
    signs = [choose.choice(["==", "!=", "<", "<=", ">", ">="]) for _ in values[1:]]
    return "(" + values[0] + "".join(f" {sign} {value}" for sign, value in zip(signs, values[1:], strict=True)) + ")"


class Dotted:
    def __init__(self, b: float) -> None:
        self.b = b


def row(columns: dict[str, Any], sample: int) -> dict[str, Any]:
    values = {name: column[sample] for name, column in columns.items() if name != "a.b"}
    values["score"], values["mixed"] = float(values["score"]), float(values["mixed"])
    return {**values, "whole": int(values["whole"]), "a": Dotted(float(columns["a.b"][sample]))}


@pytest.mark.parametrize("seed", range(200))
def test_it_is_python_s_own_value_where_nothing_is_missing(seed: int) -> None:
    choose = random.Random(seed)
    columns = random_columns(choose, missing=False)
    text = f"whole > -9 and {random_condition(choose, 3)}"
    found = Expression(text, "here").holds(columns)
    assert found.dtype == bool and found.shape == (N,)
    for sample in range(N):
        try:
            wanted = eval(text, {}, row(columns, sample))
        except ZeroDivisionError:  # a missing value: tested below
            continue
        assert found[sample] == wanted, (text, row(columns, sample))


@pytest.mark.parametrize("seed", range(100))
def test_a_condition_and_its_opposite_never_hold_together(seed: int) -> None:
    choose = random.Random(seed)
    columns = random_columns(choose, missing=True)
    text = f"whole > -9 and {random_condition(choose, 3)}"
    holds, fails = (Expression(one, "here").holds(columns) for one in (text, f"not ({text})"))
    twice = Expression(f"not (not ({text}))", "here").holds(columns)
    assert not (holds & fails).any() and np.array_equal(twice, holds)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("score > 0", [True, False, False, False]),
        ("not score > 0", [False, True, False, False]),
        ("score != 9", [True, True, False, False]),
        ("score > 0 or whole > 2", [True, False, False, True]),
        ("not (score > 0 and whole > 2)", [True, True, True, False]),
        ("whole / (whole - 2) < 99", [True, False, True, True]),
        ("word == 'a' or word != 'a'", [True, False, True, True]),
    ],
)
def test_a_missing_value_decides_nothing(text: str, wanted: list[bool]) -> None:
    columns = {
        "score": np.array([1, -1, np.nan, np.nan]),
        "whole": np.array([1, 2, 1.5, 3]),
        "word": ["a", "", "b", "c"],
    }
    assert Expression(text, "here").holds(columns).tolist() == wanted


def test_large_integers_are_compared_exactly() -> None:
    values = np.array([2**53, 2**53 + 1])
    assert Expression(f"uid == {2**53 + 1}", "here").holds({"uid": values}).tolist() == [False, True]
    assert Expression(f"uid < {10**30}", "here").holds({"uid": values}).all()


def test_numbers() -> None:
    score = Expression("score / 2 + 1", "here", condition=False)
    assert score.names == ["score"] and score.numbers({"score": np.array([1.0, 4.0])}).tolist() == [1.5, 3.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not understood"),
        ("score >", "not understood"),
        ("score = 1", "not understood"),
        ("face == bold serif", "not understood; write it like"),
        ("score\x00 > 1", "not understood"),
        ("score > " + "9" * 400, "not understood"),
        ("score > 1" + " " * 1000 + "and score > 2", "longer than 1000"),
        ("-" * 60 + "score > 1", "nested more than 50 deep"),
        ("-" * 990 + "score", "not understood|nested|no condition"),
        ("score", "'score' is no condition"),
        ("1 < 2", "names no column"),
        ("score in (1, 2)", "is compared with an operator"),
        ("score is 1", "is compared with an operator"),
        ("__import__('os').system('true') > 1", "is neither a number, nor a column"),
        ("score.real() > 1", "is neither a number"),
        ("[score for score in (1,)] > 1", "is neither a number"),
        ("(lambda: 1) > score", "is neither a number"),
        ("score ** 99 > 1", "is neither a number"),
        ("score[0] > 1", "is neither a number"),
        ("score > 1j", "is neither a number"),
        ("score > 1 if score else 2", "is no condition"),
        ("score and score > 1", "'score' is no condition"),
        ("(x := 3) > 1", "is neither a number"),
        ("f'{score}' == 'a'", "is not a column of texts|is neither a number"),
        ("word > 'a'", "compared with one column, by == or !="),
        ("'a' == 'a'", "compared with one column"),
        ("score + 1 == 'a'", "is a number, not a column of texts"),
    ],
)
def test_anything_else_is_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Expression(text, "data.where")
    assert str(caught.value).startswith("data.where ") and "\n" not in str(caught.value)


def test_a_column_of_the_wrong_kind_is_named() -> None:
    columns: dict[str, Any] = {"word": ["", "red"], "score": np.array([1.0, 2.0])}
    with pytest.raises(
        UserError, match="the column 'word' holds texts, such as 'red': compare it with a text in quotes"
    ):
        Expression("word > 1", "here").holds(columns)
    with pytest.raises(UserError, match="the column 'score' holds numbers: compare it with a number, without quotes"):
        Expression("score == '1'", "here").holds(columns)
