"""Atomic writes, locks, progress and workers: what a reader, a full disk, a second process and a fork see of them."""

from __future__ import annotations

import errno
import fcntl
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools.io import progress
from data_tools.io.errors import UserError
from data_tools.io.files import atomic_file, publish, write_atomic
from data_tools.io.formatting import count, duration, human_bytes
from data_tools.io.lock import FileLock
from data_tools.io.workers import run_workers


def test_a_file_is_replaced_as_a_whole_and_synced_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names))[1])
    with atomic_file(path) as file:
        file.write(b"ne")
        assert path.read_text() == "old"
        file.write("ü".encode())
    assert path.read_text(encoding="utf-8") == "neü" and calls == ["fsync", "replace", "fsync"]
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["state.json"]


def test_a_folder_is_published_by_rename(tmp_path: Path) -> None:
    (tmp_path / ".draft").mkdir()
    write_atomic(tmp_path / ".draft" / "a", b"\x00")
    publish(tmp_path / ".draft", tmp_path / "final")
    assert (tmp_path / "final" / "a").read_bytes() == b"\x00"


def test_a_second_holder_waits_is_told_and_gets_it_afterwards(tmp_path: Path) -> None:
    told: list[str] = []
    with FileLock(tmp_path / "lock") as first, FileLock(tmp_path / "lock") as second:
        assert first.acquire()
        assert not second.acquire(timeout=0, on_wait=lambda: told.append("never"))
        assert not second.acquire(timeout=0.2, on_wait=lambda: told.append("waiting"))
        assert told == ["waiting"]
        first.close()
        assert second.acquire(timeout=0)


@pytest.mark.parametrize("inherited", [True, False])
def test_a_lock_is_inherited_by_children_if_asked(tmp_path: Path, inherited: bool) -> None:
    lock = FileLock(tmp_path / "lock", inherited)
    assert lock.acquire(timeout=0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent has closed its end
        os._exit(0)
    os.close(read)
    lock.close()
    with FileLock(tmp_path / "lock", inherited) as other:
        assert other.acquire(timeout=0) is not inherited
    os.close(write)
    os.waitpid(child, 0)
    with FileLock(tmp_path / "lock", inherited) as other:
        assert other.acquire(timeout=0)


def test_a_file_system_without_locks_is_trusted_and_other_errors_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(number: int) -> Any:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", answer(errno.ENOLCK))
    with FileLock(tmp_path / "lock") as lock:
        assert lock.acquire() and not lock.supported
    monkeypatch.setattr(fcntl, "flock", answer(errno.EIO))
    with FileLock(tmp_path / "lock") as lock, pytest.raises(OSError, match="Input/output"):
        lock.acquire()


def test_words_for_numbers() -> None:
    assert [count(n) for n in (0.5, 512, 99_999, 123_456, 1_234_567, 40e9)] == [
        "0.5",
        "512",
        "99,999",
        "123k",
        "1.23M",
        "40.00B",
    ]
    assert [duration(s) for s in (9, 3725, 90_061)] == ["0:00:09", "1:02:05", "1d 1:01:01"]
    assert [human_bytes(size) for size in (12, 1_234_567, 3e15)] == ["12 bytes", "1.2 MB", "3000.0 TB"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_shows_position_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    clock, err = Clock(), stream()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("COLUMNS", "80")
    with progress.Progress(total=1000, done=100, unit="samples") as shown:
        for _ in range(4):
            clock.now += 2
            shown.add(50)
    live = stream is Terminal
    printed = err.getvalue().replace("\r\x1b[K", "\n").split("\n") if live else err.getvalue().split("\n")
    printed = [line for line in printed if line]
    assert printed[0] == "150/1,000 samples | 25 samples/s | ETA 0:00:34"
    assert printed[-1] == "300/1,000 samples | 25 samples/s | 0:00:08"
    assert len(printed) == (5 if live else 3), "on a terminal each is drawn, elsewhere one every 5 s and the last"
    assert ("\r" in err.getvalue()) == live


def test_workers_give_results_in_order_and_messages_at_once() -> None:
    heard: list[int] = []

    def work(item: int, send: Any) -> tuple[int, int]:
        send(item)
        time.sleep(0.05 if item == 0 else 0)
        return item * item, os.getpid()

    results = list(run_workers(work, range(20), 3, heard.append))
    assert [square for square, _ in results] == [item * item for item in range(20)]
    assert sorted(heard) == list(range(20)) and os.getpid() not in {pid for _, pid in results}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (UserError("row 3: no caption"), UserError, "^row 3: no caption$"),
        (OSError(28, "No space left on device"), UserError, "No space left on device; fix this and run again"),
        (ZeroDivisionError(), RuntimeError, "ZeroDivisionError"),
        (None, UserError, "a worker process was killed by SIGKILL; run again, with fewer --processes"),
    ],
)
def test_what_goes_wrong_in_a_worker_ends_the_run(
    failure: Exception | None, expected: type[Exception], message: str
) -> None:
    def work(item: int, _: Any) -> int:
        if item == 3 and failure is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 3 and failure is not None:
            raise failure
        return item

    with pytest.raises(expected, match=message):
        list(run_workers(work, range(1000), 2))
    assert not multiprocessing.active_children()
