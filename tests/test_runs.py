"""`ringlip runs`: every state a run directory can be in, with a run that goes on and others that are broken beside it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.test_report_compare import RECIPE, make_run
from trainer.checkpoint.store import MANIFEST, name_of
from trainer.core.types import UserError
from trainer.report.run_state import read_state
from trainer.runs import find_runs, main, table

HOLD = "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


def checkpoint(run: Path, samples: int) -> None:
    folder = run / "checkpoints" / name_of(samples)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Another process holds the run's lock, as training does."""
    command = [sys.executable, "-c", HOLD, str(run / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.kill()


def longer(samples: int) -> dict[str, object]:
    return RECIPE | {"run": {"samples": samples}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of each kind; a log has 96 pairs."""
    checkpoint(make_run(tmp_path / "finished", RECIPE, 0.5), 96)
    checkpoint(make_run(tmp_path / "stopped", longer(200)), 96)
    checkpoint(make_run(tmp_path / "died", longer(200)), 64)
    make_run(tmp_path / "lost", longer(200))
    checkpoint(make_run(tmp_path / "sweep" / "running", longer(1000)), 64)
    make_run(tmp_path / "sweep" / "new", RECIPE)
    (tmp_path / "sweep" / "new" / "log.jsonl").unlink()
    (make_run(tmp_path / "garbled", RECIPE) / "recipe.yaml").write_text("run: [")
    (make_run(tmp_path / "nameless", RECIPE) / "recipe.yaml").unlink()
    (make_run(tmp_path / "noise", RECIPE) / "log.jsonl").write_bytes(b"\0\xff not a line\n{\n")
    (make_run(tmp_path / "unscored", RECIPE) / "evaluation.json").write_text("{")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "plan.txt").write_text("no run")
    return tmp_path


def test_each_run_is_in_the_state_it_is_in(folder: Path) -> None:
    (folder / "finished" / "lock").touch()
    with held(folder / "sweep" / "running"):
        found = {str(run.relative_to(folder)): read_state(run) for run in find_runs(folder)}
    assert {name: one.state for name, one in found.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "died": "died",
        "lost": "died",
        "sweep/running": "running",
        "sweep/new": "not started",
        "garbled": "broken",
        "nameless": "broken",
        "noise": "broken",
        "unscored": "broken",
    }
    assert found["died"].note.endswith("resumes from the checkpoint at 64") and "no checkpoint" in found["lost"].note
    assert "recipe.yaml: not readable as YAML" in found["garbled"].note and "no such file" in found["nameless"].note
    assert "evaluation.json: not readable" in found["unscored"].note and found["unscored"].seen == 96
    assert (found["sweep/running"].seen, found["sweep/running"].total) == (96, 1000)
    assert read_state(folder / "sweep" / "running").state == "died", "the lock ends with its process"


def test_looking_at_a_lock_does_not_take_it_away(folder: Path) -> None:
    run = folder / "sweep" / "running"
    with held(run):
        read_state(run)
        with open(run / "lock", "w") as file, pytest.raises(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert read_state(run).state == "running"


def test_the_table_is_a_line_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(folder / "finished" / "log.jsonl", (1.0, 1.0))
    os.utime(folder / "finished" / "recipe.yaml", (time.time() - 7300, time.time() - 7300))
    with held(folder / "sweep" / "running"):
        assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["finished"] == [
        "finished",
        "finished",
        "96",
        "100%",
        "0.4167",
        "50.0%",
        "70.0%",
        "95.0%",
        "100",
        "0:00:01",
        "2",
        "h",
        "ago",
    ]
    assert lines["sweep/running"][:4] == ["sweep/running", "running", "96", "10%"]
    assert lines["sweep/new"][:3] == ["sweep/new", "not", "started"]
    assert "garbled: " in out and str(folder / "garbled" / "recipe.yaml") in out
    header = next(line for line in out.splitlines() if line.startswith("run "))
    assert "image to caption R@1" in header and header.endswith("last written")


def test_scores_of_the_log_where_nothing_was_evaluated(folder: Path) -> None:
    assert read_state(folder / "stopped").scores == {"image_to_text_r1": 0.5, "face_top1": 0.9}


def test_one_run_alone_can_be_named(folder: Path) -> None:
    run = read_state(folder / "finished")
    assert list(find_runs(folder / "finished")) == [folder / "finished"]
    assert table([run], folder / "finished", 0.0).splitlines()[1].startswith("finished  finished")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no run in it"):
        main([str(tmp_path)])
