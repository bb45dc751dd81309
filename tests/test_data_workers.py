"""Worker processes: results in order, bounded work ahead, errors with their place, and no orphans."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from trainer.core.types import UserError
from trainer.data.settings import DataSettings
from trainer.data.workers import QUEUED, Pool, shared_array
from trainer.runtime.signals import NAMES


def uneven(task: int) -> tuple[int, int]:
    time.sleep(0.02 if task % 5 == 0 else 0)
    return task, os.getpid()


@pytest.mark.parametrize("num", [1, 3])
def test_results_come_in_order_from_all_workers(num: int) -> None:
    with Pool(uneven, num, 10, str) as pool:
        results = list(pool.run(iter(range(60)), ahead=2 * num))
    assert [task for task, _ in results] == list(range(60))
    assert len({pid for _, pid in results}) == num


def test_no_more_than_asked_is_given_out_ahead() -> None:
    asked: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(100):
            asked.append(task)
            yield task

    with Pool(uneven, 2, 10, str) as pool:
        for number, _ in enumerate(pool.run(tasks(), ahead=3)):
            assert len(asked) <= number + 1 + 3
            assert len(asked) <= number + 1 + 2 * QUEUED


def test_shared_arrays_are_written_by_workers() -> None:
    array = shared_array((4, 3), np.int32)

    def write(row: int) -> None:
        array[row] = row + 1

    with Pool(write, 2, 10, str) as pool:
        list(pool.run(iter(range(4)), ahead=4))
    assert array.tolist() == [[row + 1] * 3 for row in range(4)]
    assert shared_array((0,), np.uint8).size == 0


def fail(task: int) -> int:
    if task == 3:
        raise UserError("train/00000.tar: no such shard")
    return task // (4 - task)


def test_errors_keep_their_words() -> None:
    with Pool(fail, 2, 10, str) as pool:
        results = pool.run(iter([1, 2, 3]), ahead=1)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(UserError, match=r"^train/00000.tar: no such shard$"):
            next(results)
    with Pool(fail, 2, 10, str) as pool, pytest.raises(RuntimeError, match=r"(?s)data worker \d.*ZeroDivisionError"):
        list(pool.run(iter([4]), ahead=1))


@pytest.mark.parametrize("number", NAMES, ids=lambda number: number.name)
def test_signals_that_let_a_run_finish_leave_its_workers_alone(number: signal.Signals) -> None:
    with Pool(uneven, 2, 10, str) as pool:
        results = pool.run(iter(range(1, 8)), ahead=1)
        next(results)  # the first worker is up
        next(results)
        for worker in pool.workers:
            os.kill(worker.pid, number)
        assert [task for task, _ in results] == list(range(3, 8))


def test_workers_end_with_their_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        pool = Pool(uneven, 2, 10, str)
        os.write(write, " ".join(str(worker.pid) for worker in pool.workers).encode())
        time.sleep(60)
        os._exit(0)
    pids = [int(pid) for pid in os.read(read, 100).split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("settings", "cores", "workers"),
    [({}, 6, 5), ({}, 32, 8), ({"max_workers": 24}, 32, 24), ({"workers": 31}, 32, 31), ({}, 1, 0)],
)
def test_the_most_workers_are_a_setting(
    settings: dict[str, int], cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.settings.cores", lambda: cores)
    assert DataSettings(**settings).num_workers() == workers  # type: ignore[arg-type]
