"""What is known of the training captions before the first step."""

from __future__ import annotations

import pytest

from tests.support.runs import make_shards
from tests.support.tiny_models import tiny_model
from trainer.data import DataSettings
from trainer.data.captions import CaptionSurvey, sample_captions, survey_captions


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    names = make_shards(tmp_path_factory.mktemp("names"), ["red cat", "blue dog"] * 20)
    texts = make_shards(tmp_path_factory.mktemp("texts"), ["a " * n + "house" for n in range(1, 21)])
    return str(names), str(texts)


def test_repeated_and_cut_captions_are_counted(sets: tuple[str, str]) -> None:
    preprocess = tiny_model().preprocess  # 8 tokens
    names, texts = (survey_captions(DataSettings(train=path), preprocess) for path in sets)
    assert names is not None and texts is not None
    assert (names.looked_at, names.copies, names.cut) == (40, {20: 2}, 0.0)
    assert names.repeated(2) == pytest.approx(19 / 39)
    assert (texts.copies, texts.cut, texts.longest) == ({1: 20}, 14 / 20, 22)  # n words, "house" and the end token
    assert texts.repeated(20) == 0
    assert CaptionSurvey.from_json(names.as_json()) == names


def test_sets_are_looked_at_in_the_shares_in_which_they_are_drawn(sets: tuple[str, str]) -> None:
    data = DataSettings(train=[{"path": sets[0], "weight": 3}, {"path": sets[1], "weight": 1}])  # type: ignore[list-item]
    found = sample_captions(data, 20)
    assert sum(caption in ("red cat", "blue dog") for caption in found) == 15 and len(found) == 20
    assert sample_captions(data, 20) == found
    assert survey_captions(DataSettings(train="s3://bucket/shards"), tiny_model().preprocess) is None
