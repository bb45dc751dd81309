"""Hooks of the training loop: when they run, and that what they return is logged."""

import json
from pathlib import Path

import pytest

from tests.support.forked_ranks import run_ranks
from tests.support.runs import make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer import train
from trainer.config import Recipe
from trainer.core.settings import parse
from trainer.run import Hook
from trainer.runtime.watchdog import Watchdog


def test_a_hook_runs_where_a_multiple_of_its_interval_is_crossed() -> None:
    hook = Hook("saving", 1000, lambda run: None)
    due = [after for after in range(300, 3100, 300) if hook.due(after - 300, after, finished=False, stopped=False)]
    assert due == [1200, 2100, 3000]


@pytest.mark.parametrize(
    ("at_end", "at_stop", "finished", "stopped", "expected"),
    [
        (True, False, True, False, True),
        (False, False, True, False, False),
        (True, False, False, True, False),
        (False, True, False, True, True),
        (True, True, False, False, False),
    ],
)
def test_a_hook_runs_at_the_end_and_at_a_stop_where_it_asks_to(
    at_end: bool, at_stop: bool, finished: bool, stopped: bool, expected: bool
) -> None:
    hook = Hook("saving", 0, lambda run: None, at_end=at_end, at_stop=at_stop)
    assert hook.due(0, 16, finished, stopped) is expected


def train_with_a_hook(tree: dict) -> int:
    recipe = parse(Recipe, tree, "recipe")
    train.distributed.init()
    hook = Hook("measuring", 32, lambda run: {"measured": run.samples_seen // 16}, at_end=False)
    with Watchdog(0) as watch:
        return train.train(recipe, watch, [hook])


def test_what_a_hook_returns_is_logged_at_its_position(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "pairs", tiny_captions(40))
    tree = {
        "run": {"directory": str(tmp_path / "run"), "samples": 80},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(shards), "workers": 0},
        "batch": {"size": 16},
        "engine": {"precision": "fp32"},
        "log": {"trackers": "none"},
    }
    assert run_ranks(train_with_a_hook, 2, tree) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["samples_seen"], line["measured"]) for line in lines if "measured" in line] == [(32, 2), (64, 4)]
