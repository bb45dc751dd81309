"""The log has no doubles, no NaN and no writer but rank 0; the progress line is right in both of its forms."""

import io
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.io import progress
from tests.support.forked_ranks import run_ranks
from trainer.core.distributed import rank
from trainer.core.settings import parse
from trainer.core.types import UserError
from trainer.metrics import LogSettings, RunLog, meters
from trainer.metrics.log import LineFile, cut_back
from trainer.metrics.meters import Meter
from trainer.metrics.progress_line import ProgressLine, render

QUIET = LogSettings(trackers=(), every=2)
VALUES = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "scale": 10.0, "bias": -10.0}


class Clock:
    """Time that passes only when told to, for all of trainer.metrics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (meters, progress):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def steps(log: RunLog, first: int, last: int, size: int = 8) -> None:
    for step in range(first, last + 1):
        log.step(step, step * size, VALUES | {"loss": 1.0 / step})


def test_a_line_of_the_log(tmp_path: Path, clock: Clock) -> None:
    log = RunLog(tmp_path, QUIET, 80)
    with log.waiting():
        clock.sleep(1)
    steps(log, 1, 1)
    with log.paused():
        clock.sleep(100)
        log.note(8, {"eval": {"image_to_text_r1": 0.5}})
    clock.sleep(3)
    steps(log, 2, 3)
    log.close()
    note, written = lines(tmp_path)
    assert note == {"samples_seen": 8, "eval": {"image_to_text_r1": 0.5}}
    assert written.pop("memory_bytes") > 50e6
    position = {"step": 2, "samples_seen": 16}
    assert written == position | VALUES | {
        "loss": 0.5,
        "pairs_per_second": 4.0,
        "step_seconds": 2.0,
        "seconds": 4.0,
        "data_wait": 0.25,
    }


def test_the_last_step_is_always_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, 24)
    steps(log, 1, 3)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 3]


def test_what_is_no_number_is_null_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, LogSettings(trackers=("tensorboard",), every=10), 800)
    log.step(1, 8, VALUES | {"loss": float("nan"), "grad_norm": float("inf"), "skipped": "not finite"})
    log.note(8, {"eval": {"worst": [1.0, float("-inf")]}})
    log.close()
    written, note = lines(tmp_path)
    assert (
        written["loss"] is None
        and written["grad_norm"] is None
        and written["skipped"] == "not finite"
        and note["eval"]["worst"] == [1.0, None]
    )
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert "step 1: loss is nan, grad_norm is inf" in capsys.readouterr().err


def test_a_resumed_log_has_no_doubles(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, 80)
    steps(log, 1, 6)
    log.note(48, {"eval": {}})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "samples_')  # the machine went away here
    again = RunLog(tmp_path, QUIET, 80, samples_seen=32)
    before = lines(tmp_path)[-1]["seconds"]
    steps(again, 5, 10)
    again.close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10]
    assert [line["seconds"] for line in lines(tmp_path)] == sorted(line["seconds"] for line in lines(tmp_path))
    assert lines(tmp_path)[2]["seconds"] > before
    RunLog(tmp_path, QUIET, 80).close()  # from the beginning
    assert lines(tmp_path) == []
    assert cut_back(tmp_path / "none.jsonl", 5) == 0


def test_every_start_is_in_the_environment(tmp_path: Path) -> None:
    RunLog(tmp_path, QUIET, 80).close()
    (tmp_path / "environment.json").write_text((tmp_path / "environment.json").read_text())
    RunLog(tmp_path, QUIET, 80, samples_seen=40).close()
    starts = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert [start["samples_seen"] for start in starts] == [0, 40]
    assert (
        torch.__version__.startswith(starts[0]["packages"]["torch"])
        and starts[0]["ranks"] == 1
        and starts[0]["command"]
        and starts[0]["git"]
    )
    (tmp_path / "environment.json").write_text('{"starts": [')
    RunLog(tmp_path, QUIET, 80).close()
    assert len(json.loads((tmp_path / "environment.json").read_text())["starts"]) == 1


def test_rank_0_alone_writes_and_the_slowest_is_named(tmp_path: Path) -> None:
    def work() -> list[str]:
        run_dir = tmp_path / f"of rank {rank()}"  # so that a second writer would show
        threads = torch.get_num_threads()
        log = RunLog(run_dir, LogSettings(every=2), 32, recipe={"run": {"seed": 0}})
        for step in (1, 2):
            with log.waiting():
                time.sleep(0.1 * rank())
            log.step(step, step * 8, VALUES)
        for step in (3, 4):
            log.step(step, step * 8, VALUES, local_seconds=(0.5, 3.0, 1.0)[rank()])
        log.close()
        assert torch.get_num_threads() == threads
        return sorted(os.listdir(run_dir))

    found = run_ranks(work, 3)
    assert found == [["environment.json", "log.jsonl", "tensorboard"], [], []]
    written, later = lines(tmp_path / "of rank 0")
    assert later["slowest_rank"] == 1 and later["rank_seconds"] == {"least": 0.5, "median": 1.0, "most": 3.0}
    assert "waits for rank 1 (+2.00 s)" in render(later, 32)
    assert "waits for" not in render(later | {"rank_seconds": {"least": 0.9, "median": 1.0, "most": 1.2}}, 32)
    assert written["slowest_rank"] == 2 and written["data_wait"] > 0
    hosts = json.loads((tmp_path / "of rank 0" / "environment.json").read_text())["starts"][0]["hosts"]
    assert list(hosts.values()) == [3]


def test_tensorboard_goes_on_in_one_curve(tmp_path: Path) -> None:
    log = RunLog(tmp_path, LogSettings(every=1), 80, recipe={"run": {"seed": 3}})
    steps(log, 1, 6)
    log.close()
    again = RunLog(tmp_path, LogSettings(every=1), 80, samples_seen=32)
    steps(again, 5, 7)
    again.note(56, {"eval": {"image_to_text_r1": 0.25}})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [8, 16, 24, 32, 40, 48, 56]
    assert events.Scalars("eval/image_to_text_r1")[0].value == 0.25
    assert b"seed: 3" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_trackers_are_chosen_by_name() -> None:
    assert parse(LogSettings, {"trackers": "none"}, "x").trackers == ()
    assert parse(LogSettings, {"trackers": "wandb"}, "x").trackers == ("wandb",)
    with pytest.raises(UserError, match="trackers"):
        parse(LogSettings, {"trackers": ["wandbb"]}, "x")


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="not installed: pip install wandb"):
        RunLog(tmp_path, LogSettings(trackers=("wandb",)), 80)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


SHOWN = {
    "step": 1234,
    "samples_seen": 631808,
    "pairs_per_second": 780.4,
    "memory_bytes": 3_210_000_000,
    "data_wait": 0.012,
} | VALUES


def test_the_line() -> None:
    assert render(SHOWN, 5_120_000) == (
        "step 1,234/10,000 12% · 632k pairs · loss 2.0000 · lr 1.00e-03 · grad 0.5 · t 10.00 · b -10.00 · 780 "
        "pairs/s · 3.2 GB · data 1% · ETA 1:35:51"
    )
    assert "loss" not in render(SHOWN | {"loss": None}, 5_120_000)
    assert render(SHOWN, 5_120_000, 80) == "step 1,234/10,000 12% · loss 2.0000 · 780 pairs/s · 3.2 GB · ETA 1:35:51"
    assert render(SHOWN, 5_120_000, 30) == "step 1,234/10,000 12% · loss 2"


def test_a_terminal_is_rewritten_and_elsewhere_lines_are_rare(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = ProgressLine(5_120_000, 30.0, stream)
        for _ in range(6):
            line.show(SHOWN)
            clock.sleep(0.15)
        line.show(SHOWN, last=True)
        line.close()
    assert terminal.getvalue().count("\r\x1b[K") == 4 and terminal.getvalue().count("\n") == 1
    assert {len(part.rstrip()) for part in terminal.getvalue().split("\r\x1b[K")} == {0, 59}
    assert "\r" not in file.getvalue() and file.getvalue().count("\n") == 2


def test_a_meter_leaves_out_what_is_aside(clock: Clock) -> None:
    meter = Meter()
    with meter.paused():
        clock.sleep(7)
    clock.sleep(2)
    meter.step(8)
    assert meter.pairs_per_second() == 4
    assert meter.read()[:3] == (1, 8, 2.0) and meter.read().samples == 0


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = LineFile(tmp_path / "log.jsonl")
    file.append("before\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (10, hard)
        )  # a write beyond it is cut short, or fails, as on a full disk
        file.append("first that does not fit\n")
        file.append("second\n")
        assert (tmp_path / "log.jsonl").read_text() == "before\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    file.append("after\n")
    file.close()
    assert (tmp_path / "log.jsonl").read_text() == "before\nfirst that does not fit\nsecond\nafter\n"
    assert capsys.readouterr().err.count("wait in memory") == 1
