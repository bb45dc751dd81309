"""The word-level tokenizer: what transformers loads is what was trained."""

import csv
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from data_tools.commands import shard, vocabulary
from data_tools.io.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    with (root / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number, caption in enumerate(["Greek small letter alpha, bold", "greek letter beta, bold", "greek arrow"]):
            Image.new("L", (32, 32), number).save(root / f"{number}.png")
            table.writerow([f"{number}.png", caption])
    shard.main(
        [
            str(root / "pairs.csv"),
            str(root / "shards"),
            "--image",
            "image",
            "--caption",
            "caption",
            "--shard-size",
            "2",
            "--quiet",
        ]
    )
    return root / "shards"


def test_transformers_loads_the_tokenizer(shards: Path, tmp_path: Path) -> None:
    assert vocabulary.main([str(shards), str(tmp_path), "--num-tokens", "8"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("GREEK letter omega, bold", padding="max_length", truncation=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["greek", "letter", "[UNK]", ",", "bold", "[EOS]", "[PAD]", "[PAD]"]


def test_the_most_frequent_words_are_kept(shards: Path, tmp_path: Path) -> None:
    vocabulary.main([str(shards), str(tmp_path), "--size", "4"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 4
    assert tokenizer.convert_ids_to_tokens(3) == "greek"


def test_an_unusable_size_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size 3"):
        vocabulary.main([str(shards), str(tmp_path), "--size", "3"])
