"""Trains a word-level tokenizer on the captions of a dataset, for models trained from scratch on a small vocabulary.

    python -m data_tools vocabulary demo/shards/train demo/tokenizer

writes ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer.from_pretrained`` loads. A
token is a lower-cased word or punctuation mark; id 0 is padding, 1 the end of text, 2 an unknown word (the end token
cannot be 2: transformers' CLIP treats that id as a marker of old configs).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from data_tools.commands.arguments import Parser, whole
from data_tools.format.index import Dataset
from data_tools.format.map_shards import open_local
from data_tools.io.errors import UserError
from data_tools.io.files import write_atomic
from data_tools.io.output import make_folder, refuse_file

SPECIAL = ("[PAD]", "[EOS]", "[UNK]")


def captions(dataset: Dataset) -> Iterator[str]:
    """Every caption, shard by shard."""
    for number in range(dataset.num_shards):
        rows = dataset.shard(number)
        with open(dataset.tar_path(number), "rb") as tar:
            for offset, size in zip(rows["text_offset"].tolist(), rows["text_size"].tolist(), strict=True):
                tar.seek(offset)
                yield tar.read(size).decode("utf-8", errors="replace")


def train(texts: Iterator[str], size: int, num_tokens: int) -> tuple[str, dict[str, object]]:
    """The contents of tokenizer.json and tokenizer_config.json for the ``size`` most frequent words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", SPECIAL.index("[EOS]"))]
    )
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(SPECIAL)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": num_tokens,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "eos_token": "[EOS]",
        "padding_side": "right",
    }
    return tokenizer.to_str(), config


def main(argv: list[str]) -> int:
    parser = Parser("vocabulary", __doc__)
    parser.add_argument("shards", metavar="SHARDS", help="a dataset written by `data_tools shard`")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the tokenizer")
    parser.add_argument(
        "--size", type=whole(1), default=8192, help="number of words, the most frequent ones (default 8192)"
    )
    parser.add_argument(
        "--num-tokens", type=whole(2), default=16, help="context length, end token included (default 16)"
    )
    options = parser.parse_args(argv)
    if options.size <= len(SPECIAL):
        raise UserError(
            f"--size {options.size}: {len(SPECIAL)} entries are taken by special tokens; choose a larger one"
        )
    refuse_file(options.out)
    tokenizer, config = train(captions(open_local(options.shards)), options.size, options.num_tokens)
    make_folder(options.out)
    (options.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_atomic(options.out / "tokenizer.json", tokenizer)
    print(f"{len(json.loads(tokenizer)['model']['vocab']):,} words -> {options.out}", file=sys.stderr)
    return 0
