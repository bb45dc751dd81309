"""Captions: cleaned, capped, kept in every script, and rejected by name when nothing is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.samples.captions import clean, clean_all
from data_tools.samples.reject import Reject


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a \t cat\r\n\r\non a mat ", "a cat on a mat"),
        ("nul\0inside", "nul inside"),
        ("\ufeffmark \x9f\x07bell", "mark bell"),
        ("\u202bשלום עולם\u202c", "\u202bשלום עולם\u202c"),
        ("👩‍👩‍👧 family 🇫🇷 naïve 中文", "👩‍👩‍👧 family 🇫🇷 naïve 中文"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ('keeps "quotes", commas; and <b>tags</b>', 'keeps "quotes", commas; and <b>tags</b>'),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean(raw, 1000) == (cleaned, False)


def test_a_megabyte_is_cut_between_words() -> None:
    text, cut = clean("word " * 200_000, 99)
    assert cut and text == ("word " * 20).strip()[:99]
    assert clean("x" * 1_000_000, 50) == ("x" * 50, True)
    assert clean("one two three", 8) == ("one two", True) and clean("one two three", 7) == ("one two", True)


def test_several_captions() -> None:
    assert clean_all(["a", None, " ", "b", "a "], 100) == (["a", "b"], False)
    assert clean_all([7], 100) == (["7"], False)


@pytest.mark.parametrize(
    ("values", "reason"), [([], "caption_missing"), ([None], "caption_missing"), (["", " \0 "], "caption_empty")]
)
def test_nothing_left(values: list[str | None], reason: str) -> None:
    with pytest.raises(Reject) as caught:
        clean_all(values, 100)
    assert caught.value.reason == reason


@given(st.text(), st.integers(1, 50))
def test_any_text_becomes_one_line_of_utf8(text: str, length: int) -> None:
    cleaned, _ = clean(text, length)
    assert len(cleaned) <= length and cleaned == cleaned.strip()
    assert "\n" not in cleaned and "\0" not in cleaned and cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert clean(cleaned, length) == (cleaned, False)
