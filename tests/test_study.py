"""`python -m trainer.study`: its YAML, its sign, its runs, and what a stop changes (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer.core.shipped import shipped
from trainer.core.types import UserError
from trainer.study import cells
from trainer.study.__main__ import main
from trainer.study.cells import Bench
from trainer.study.settings import Claim, load_study
from trainer.study.verdict import NOT_RUN, OPPOSITE, SAME, UNDECIDED, judge

SHIPPED = sorted(path.stem for path in (shipped("recipes") / "studies").glob("*.yaml"))
FAKE = """
import hashlib, json, pathlib, sys, yaml
tree = yaml.safe_load(open(sys.argv[1]))
run = pathlib.Path(tree["run"]["directory"])
run.mkdir(exist_ok=True)
assert not (run / "log.jsonl").exists(), "two cells in one directory"
score = tree["run"]["seed"] / 100 + (0.8 if tree["loss"]["name"] == "softmax" else 0.5) - abs(tree["optim"]["lr"] - 1e-3)
line = {"samples_seen": 8, "eval": {"image_to_text_r1": score, "text_to_image_r1": score}, "advice": "eat more"}
(run / "log.jsonl").write_text(json.dumps(line) + chr(10))
"""
"""Stands for a training: its score is known, and it fails where another has been."""


def study_file(folder: Path, recipe: Path | str = "glyphs", **more: Any) -> Path:
    tree = {
        "title": "Two losses",
        "paper": "a paper",
        "found": "softmax is ahead",
        "recipe": str(recipe),
        "grid": {8: {"batch.size": 8}, 16: {"batch.size": 16}},
        "contestants": {"sig": {"loss.name": "sigmoid"}, "soft": {"loss.name": "softmax"}},
        "overrides": {"optim.lr": 1e-3},
        "sign": [{"more": "soft @ 8", "than": "sig @ 8", "by": 0.1}],
    } | more
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "command", lambda recipe, gpus: [sys.executable, "-c", FAKE, str(recipe)])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_says_how_to_run_it_and_its_runs_are_recipes_in_directories_of_their_own(name: str) -> None:
    path = shipped("recipes") / "studies" / f"{name}.yaml"
    assert f"python -m trainer.study {name}\n" in path.read_text().split("\ntitle:")[0]
    _, study = load_study(name)
    bench = Bench(study, Path("out"), "demo/shards")
    jobs = [bench.job(c, x, seed) for c in study.contestants for x in study.grid for seed in range(study.seeds)]
    assert len({job.folder for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("more", "than", "verdict"),
    [
        ([0.8, 0.82], [0.5, 0.52], SAME),
        ([0.5, 0.52], [0.8, 0.82], OPPOSITE),
        ([0.5, 0.7], [0.45, 0.65], UNDECIDED),
        ([0.8], [0.5], SAME),
        ([], [0.5], NOT_RUN),
    ],
)
def test_a_sign_needs_more_than_seeds_explain(more: list[float], than: list[float], verdict: str) -> None:
    found = judge(Claim(more="a @ 1", than="b @ 1"), {("a", "1"): more, ("b", "1"): than})
    assert found["verdict"] == verdict
    assert (found["error"] is None) == (len(more) < 2)


def test_a_claim_may_be_of_differences_and_of_a_margin() -> None:
    scores = {("a b", "1"): [3.0], ("c", "1"): [1.0], ("a b", "2"): [2.0], ("c", "2"): [1.5]}
    claim = Claim(more="a b @ 1 - c @ 1", than="a b @ 2 - c @ 2")
    assert judge(claim, scores)["value"] == 1.5
    assert judge(claim.model_copy(update={"by": 1.6}), scores)["verdict"] == OPPOSITE
    assert judge(Claim(more="c @ 1", than=0.9), scores)["verdict"] == SAME


def test_the_error_is_that_of_a_difference_of_means() -> None:
    found = judge(Claim(more="a @ 1", than="b @ 1"), {("a", "1"): [1.0, 3.0], ("b", "1"): [0.0, 0.0]})
    assert found["error"] == pytest.approx(1.0) and found["value"] == 2.0
    assert found["verdict"] == UNDECIDED, "Student's t of 2 degrees of freedom is 2.92"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sign": [{"more": "soft @ 9", "than": "sig @ 8"}]}, r"names no column of the grid: '9'; known: 8, 16"),
        ({"sign": [{"more": "hard @ 8", "than": "sig @ 8"}]}, r"names no contestant: 'hard'; known: sig, soft"),
        ({"sign": [{"more": "soft", "than": 1}]}, r"'soft' is not a sum of CONTESTANT @ LABEL"),
        ({"seed": 3}, r"unknown key 'seed'; did you mean 'seeds'\?"),
        ({"contestants": {"sig": {"loss.nam": 1}, "soft": {}}}, r"sig @ 8: .*unknown key 'loss.nam'"),
        ({"recipe": "nowhere.yaml"}, r"sig @ 8: nowhere.yaml: no such recipe"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        main([str(study_file(tmp_path, **more)), "--out", str(tmp_path / "out"), "--data", "d"])
    assert "\n" not in str(raised.value)


def test_an_unknown_study_names_the_known() -> None:
    with pytest.raises(UserError, match=r"bach: no such study; RingLIP ships .*batch"):
        main(["bach"])


def test_a_stopped_study_ends_as_one_that_never_stopped(tmp_path: Path, fake: None) -> None:
    path = study_file(tmp_path, rates=[0.5, 1.0])
    common = [str(path), "--data", "d", "--jobs", "2"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    parts = [*common, "--out", str(tmp_path / "parts")]
    assert main([*parts, "--budget", "1e-9"]) == 0
    assert json.loads((tmp_path / "parts/study.json").read_text())["verdict"] == NOT_RUN
    assert main([*parts, "--seeds", "1"]) == 0
    assert main(parts) == 0
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("runs/*/result.json")}
    assert len(results) == 4 * 2 + 4 * 2, "a trial a rate and a run a seed"
    assert main(parts) == 0
    assert results == {path: path.stat().st_mtime_ns for path in results}, "finished runs are kept"
    whole, again = ((tmp_path / name / "study.json").read_text() for name in ("whole", "parts"))
    assert whole == again
    found = json.loads(whole)
    assert found["verdict"] == SAME and found["claims"][0]["value"] == pytest.approx(0.3)
    assert {cell["rate"] for cell in found["cells"]} == {1e-3}, "the better of the two rates"
    text = (tmp_path / "whole/study.html").read_text()
    assert "softmax is ahead" in text and SAME in text and "eat more" in text and text.count("<svg") == 1
    assert (tmp_path / "whole/R_1.svg").read_text().count("<circle") == 4 + 2, "a point a cell, and the key"


def test_a_failed_run_names_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "command", lambda recipe, gpus: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match=r"sig @ 8, seed 0: training ended with exit code 3; see .*output.txt"):
        main([str(study_file(tmp_path)), "--out", str(tmp_path / "out"), "--data", "d", "--jobs", "1"])


def test_a_failed_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = "print('error: an older one'); print('error: d/train: no such shards'); raise SystemExit(2)"
    monkeypatch.setattr(cells, "command", lambda recipe, gpus: [sys.executable, "-c", failing])
    with pytest.raises(UserError, match=r"exit code 2; see .*output\.txt \(d/train: no such shards\); start again"):
        main([str(study_file(tmp_path)), "--out", str(tmp_path / "out"), "--data", "d", "--jobs", "1"])


def test_preparations_run_once_and_a_failed_one_is_told(tmp_path: Path, fake: None) -> None:
    common = ["--out", str(tmp_path / "out"), "--data", "d"]
    assert main([str(study_file(tmp_path, prepare=["timeit -n1 -r1 pass"], seeds=1)), *common]) == 0
    [done] = (tmp_path / "out").glob("prepare-*/done")
    before = done.stat().st_mtime_ns
    assert main([str(study_file(tmp_path, prepare=["timeit -n1 -r1 pass"], seeds=1)), *common]) == 0
    assert done.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"prepare: `no_such_module` ended with exit code 1; see "):
        main([str(study_file(tmp_path, prepare=["no_such_module"], seeds=1)), *common])


def test_real_trainings_are_stopped_with_the_study_and_go_on(tmp_path: Path) -> None:
    """The real command on a tiny recipe, stopped by a signal once its first run has started."""
    shards = make_shards(tmp_path / "pairs", tiny_captions(64))
    recipe = tmp_path / "recipe.yaml"
    tree = {
        "run": {"samples": 64},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(shards), "validation": str(shards), "workers": 0},
        "batch": {"size": 16},
        "engine": {"ds_config": "zero0"},
    }
    recipe.write_text(yaml.safe_dump(tree))
    path = study_file(
        tmp_path, recipe, grid={"all": {}}, seeds=1, sign=[{"more": "soft @ all", "than": "sig @ all", "by": -1.1}]
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainer.study", str(path), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/recipe.yaml")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130
    assert not list(out.glob("runs/*/result.json"))
    assert main(command[3:]) == 0
    found = json.loads((out / "study.json").read_text())
    assert found["runs"] == {"finished": 2, "all": 2} and found["verdict"] == SAME
    assert not list(out.glob("runs/*/run/checkpoints"))
