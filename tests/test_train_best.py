"""Evaluation at 0 samples, the best checkpoint kept and exported, patience: the same when a run is stopped and goes on,
on other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, make_shards, mistake, stopped_at_step
from tests.support.tiny_models import tiny_captions, tiny_pretrained
from trainer import evaluate, export, run
from trainer.checkpoint import find_best
from trainer.config import load
from trainer.core.types import UserError
from trainer.evals import History, read_history
from trainer.runtime.signals import EXIT_AGAIN

BEST = ["checkpoint.best=image_to_text_r1", "eval.every=16"]
SCORES = [0.5, 0.7, 0.6, 0.7, 0.4]
"""Of the evaluations at 0, 16, 32, ... samples."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pairs"), tiny_captions(48))


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    tiny_pretrained("siglip", tmp_path / "base")
    tree: dict[str, Any] = {
        "run": {"directory": str(tmp_path / "run"), "samples": 64},
        "model": {"path": str(tmp_path / "base")},
        "data": {"train": str(shards), "validation": str(shards), "workers": 0},
        "batch": {"size": 16},
        "engine": {"precision": "fp32"},
        "checkpoint": {"keep": 1, "every": 16},
        "log": {"every": 1, "line_seconds": 1000, "trackers": "none"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def with_scores(stop: int, recipe: Path, *overrides: str) -> int:
    """A run whose evaluations find SCORES; a signal comes after step ``stop``."""
    real = run.evals.run
    run.evals.run = lambda *args, **more: real(*args, **more) | {"image_to_text_r1": SCORES[seen()]}
    runs: list[Any] = []
    build = run.Run.evaluate
    run.Run.evaluate = lambda self: runs.append(self) or build(self)  # type: ignore[method-assign]

    def seen() -> int:
        return runs[-1].samples_seen // 16

    return stopped_at_step(stop, recipe, *overrides)


def evaluated(directory: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [(line["samples_seen"], line["eval"]["image_to_text_r1"]) for line in lines if "eval" in line]


def checkpoints(directory: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in (directory / "checkpoints").glob("samples-*"))


def test_the_base_is_evaluated_before_the_first_step_and_a_score_below_it_is_told(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(call, 1, recipe, "run.samples=16", "optim.lr=0.5")
    said = capfd.readouterr().err
    [base, end] = evaluated(tmp_path / "run")
    assert (base[0], end[0]) == (0, 16) and end[1] < base[1], "this rate was to spoil it"
    model, _ = evaluate.load_model(str(tmp_path / "base"))
    expected = evaluate._evaluate(model, load(recipe).eval, load(recipe).data, "fp32").metrics
    assert base[1] == expected["image_to_text_r1"]
    assert f"worse than the model that this run started from: image_to_text_r1 {100 * base[1]:.1f} -> " in said
    assert "rate 0.5" in said and "times what whole pretrained towers usually take" in said


def test_the_best_checkpoint_stays_and_is_exported_and_patience_ends_the_run(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = [*BEST, "eval.patience=2", "run.samples=320"]
    run_ranks(with_scores, 2, 100, recipe, *args)
    said = capfd.readouterr().err
    assert evaluated(tmp_path / "run") == list(zip([0, 16, 32, 48], SCORES, strict=False))
    assert checkpoints(tmp_path / "run") == [16, 48], "the best and the last"
    assert "no better image_to_text_r1 in 2 evaluations (eval.patience), the best is 70.0% at 16 samples" in said
    assert run_ranks(with_scores, 2, 100, recipe, *args) == [0, 0]
    assert checkpoints(tmp_path / "run") == [16, 48], "it is finished, and stays so"
    folder, record = find_best(tmp_path / "run")
    assert folder.name == "samples-000000016" and record is not None and record["score"] == 0.7
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "best by image_to_text_r1, 70.0%" in capfd.readouterr().out
    assert evaluate.load_model(str(tmp_path / "run"))[1].endswith("samples-000000016")


def test_a_run_that_was_stopped_goes_on_to_the_same_best_on_other_ranks(recipe: Path, tmp_path: Path) -> None:
    run_ranks(with_scores, 1, 100, recipe, *BEST, f"run.directory={tmp_path / 'whole'}")
    assert run_ranks(with_scores, 2, 2, recipe, *BEST) == [EXIT_AGAIN] * 2
    assert evaluated(tmp_path / "run") == list(zip([0, 16], SCORES, strict=False)), "a signal does not wait"
    run_ranks(with_scores, 1, 100, recipe, *BEST)
    assert (
        evaluated(tmp_path / "run") == evaluated(tmp_path / "whole") == list(zip(range(0, 80, 16), SCORES, strict=True))
    )
    assert find_best(tmp_path / "run")[1] == find_best(tmp_path / "whole")[1]
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole") == [16, 64]


def test_a_base_that_stays_the_best_is_what_is_exported(recipe: Path, tmp_path: Path) -> None:
    assert run_ranks(call, 1, recipe, *BEST, "run.samples=32", "optim.lr=0.5") == [0]
    folder, record = find_best(tmp_path / "run")
    assert folder.name == "samples-000000000" and record is not None and record["samples_seen"] == 0


def test_what_cannot_be_judged_is_told(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.patience: set checkpoint\.best"):
        load(recipe, ["eval.patience=2"])
    with pytest.raises(UserError, match=r"checkpoint\.best: nothing is evaluated during this run: set eval\.every"):
        load(recipe, ["checkpoint.best=image_to_text_r1"])
    with pytest.raises(UserError, match=r"set data\.validation"):
        load(recipe, [*BEST, "data.validation=''"])
    [text] = run_ranks(mistake, 1, recipe, "checkpoint.best=[image_to_text_r1, r1]", "eval.every=16")
    assert "no metric 'r1' is measured here; known: image_to_text_r1" in text


def test_the_first_of_equals_is_best_and_what_is_no_number_never() -> None:
    found = History(
        [(0, {"a": 0.4, "b": 0.6}), (1, {"a": 0.6, "b": 0.4}), (2, {"a": float("nan"), "b": 1.0})], ["a", "b"]
    )
    assert found.best == (0, 0.5) and found.since_best == 2 and not found.improved
    found.add(3, {"a": 0.6, "b": 0.6})
    assert found.best == (3, 0.6) and found.since_best == 0 and found.improved


def test_only_lines_up_to_the_position_count(tmp_path: Path) -> None:
    lines = [
        {"samples_seen": 16, "loss": 1.0},
        {"samples_seen": 16, "eval": {"a": 0.1}},
        {"samples_seen": 32, "eval": {"a": 1}},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"samples_seen": 16, "ev')
    assert read_history(tmp_path, 16).records == [(16, {"a": 0.1})]
    assert read_history(tmp_path / "none", 16).records == []
