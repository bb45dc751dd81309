"""Whatever becomes of a rank, the others end soon and one line says which rank it was, where, at which step and why.
Real processes."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.forked_ranks import run_ranks
from trainer.core.types import RunFailed, UserError
from trainer.runtime.watchdog import Watchdog
from trainer.runtime.watchdog.protocol import GRACE, Patience
from trainer.runtime.watchdog.server import Hub, RankState, laggard, listen

LIMIT = 30.0
"""Seconds from the death of a rank to the exit of all others that the README promises; measured far below."""


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test() -> Iterator[None]:
    yield
    for child in psutil.Process().children():
        child.kill()


class Ended(NamedTuple):
    codes: list[int]
    seconds: float
    """From the fault to the last exit."""
    lines: list[str]
    """What all ranks printed that begins with "error:"."""
    output: str


def ranks(
    folder: Path,
    world: int,
    work: Callable[[Watchdog], None],
    heartbeat_timeout: float = 20.0,
    timeout: float = 60.0,
    patience: float = math.inf,
) -> list[int]:
    """Forks ranks that run ``work`` under a watchdog; returns their process ids. Each writes its stderr to
    ``folder``."""
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                sys.stderr = os.fdopen(2, "w")  # not pytest's
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
                meet = f"file://{folder}/meet"
                dist.init_process_group(
                    "gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
                )
                with Watchdog(heartbeat_timeout, patience) as watch:
                    work(watch)
                code = 0
            except UserError as error:
                if not error.told:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                code = error.code
            except BaseException:
                os.write(2, traceback.format_exc().encode())
                code = 1
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def collect(folder: Path, pids: list[int], skip: int | None = None, since: float | None = None) -> Ended:
    """Waits for all but ``skip`` (stopped: killed afterwards); a rank that outlives the limit by far is killed and
    fails the test."""
    began = since or time.monotonic()
    codes = {}
    seconds = 0.0
    deadline = time.monotonic() + 4 * LIMIT
    while len(codes) < len(pids) - (skip is not None):
        for rank, pid in enumerate(pids):
            if rank in codes or rank == skip:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank], seconds = os.waitstatus_to_exitcode(status), time.monotonic() - began
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"ranks {sorted(set(range(len(pids))) - codes.keys())} never ended")
        time.sleep(0.01)
    if skip is not None:
        os.kill(pids[skip], signal.SIGKILL)
        os.waitpid(pids[skip], 0)
    output = "".join((folder / f"stderr-{rank}").read_text() for rank in range(len(pids)))
    return Ended(
        [codes[r] for r in sorted(codes)],
        seconds,
        [line for line in output.splitlines() if line.startswith("error:")],
        output,
    )


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "waited in vain for two minutes"
        time.sleep(0.01)


def wait_for(path: Path) -> None:
    until(path.exists)


def everybody_is_known_at(watch: Watchdog, step: int) -> bool:
    """Whether rank 0 has heard all ranks there, or another rank has heard rank 0: what either could say of a death
    now."""
    if watch._hub is None:
        return watch._zero.step == step
    return [member.step for member in watch._hub._members.values()] == [step] * dist.get_world_size()


def collectives(watch: Watchdog) -> None:
    for step in range(1, 1_000_000):
        watch.doing("training", step)
        dist.all_reduce(torch.ones(1))


def apart(watch: Watchdog) -> None:
    """Nothing that could tell a rank of another."""
    watch.doing("reading data", 7)
    time.sleep(600)


def started(folder: Path, work: Callable[[Watchdog], None]) -> Callable[[Watchdog], None]:
    def wrapped(watch: Watchdog) -> None:
        watch.doing("reading data", 7)
        dist.barrier()
        until(lambda: everybody_is_known_at(watch, 7))
        dist.barrier()  # nobody goes on before
        (folder / f"ready-{dist.get_rank()}").touch()
        work(watch)

    return wrapped


@pytest.mark.parametrize(("victim", "work"), [(0, collectives), (1, collectives), (0, apart), (2, apart)])
def test_a_killed_rank_ends_all_others_with_one_line(
    tmp_path: Path, victim: int, work: Callable[[Watchdog], None]
) -> None:
    pids = ranks(tmp_path, 3, started(tmp_path, work))
    for rank in range(3):
        wait_for(tmp_path / f"ready-{rank}")
    began = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    ended = collect(tmp_path, pids, since=began)
    assert ended.seconds < LIMIT
    assert [code for rank, code in enumerate(ended.codes) if rank != victim] == [1, 1]
    [line] = ended.lines
    assert line.startswith(f"error: rank {victim} on {socket.gethostname()} at step ")
    assert "gone without a word" in line
    if work is apart:
        assert "at step 7 (reading data)" in line
    assert "Traceback" not in ended.output  # that its neighbours fail too is no news


@pytest.mark.slow  # seconds of silence: on a busy machine more than its margin may pass
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_noticed_by_its_silence(tmp_path: Path, victim: int) -> None:
    pids = ranks(tmp_path, 3, started(tmp_path, apart), heartbeat_timeout=6)
    for rank in range(3):
        wait_for(tmp_path / f"ready-{rank}")
    os.kill(pids[victim], signal.SIGSTOP)
    ended = collect(tmp_path, pids, skip=victim)
    assert ended.codes == [1, 1]
    [line] = ended.lines
    assert f"rank {victim} on {socket.gethostname()} at step 7 (reading data): silent for 6 s" in line


def test_an_error_of_one_rank_is_the_one_line_of_all(tmp_path: Path) -> None:
    def work(watch: Watchdog) -> None:
        watch.doing("reading data", 3)
        if dist.get_rank() == 1:
            raise RunFailed("data worker 0 has been silent for 300 s while reading a.tar")
        dist.barrier()

    ended = collect(tmp_path, ranks(tmp_path, 3, work))
    where = socket.gethostname()
    assert ended.lines == [
        f"error: rank 1 on {where} at step 3 (reading data): data worker 0 has been silent for 300 s while reading "
        f"a.tar"
    ]
    assert ended.codes == [1, 1, 1]


def test_a_bug_shows_its_traceback_once(tmp_path: Path) -> None:
    def work(watch: Watchdog) -> None:
        if dist.get_rank() == 2:
            raise KeyError("a bug")
        dist.barrier()

    ended = collect(tmp_path, ranks(tmp_path, 3, work))
    assert len(ended.lines) == 1 and "rank 2" in ended.lines[0] and "KeyError: 'a bug'" in ended.lines[0]
    assert ended.output.count("Traceback") == 1
    assert ended.codes == [1, 1, 1]


def test_a_mistake_on_all_ranks_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    def work(watch: Watchdog) -> None:
        raise UserError("batch.size 15 does not divide")

    ended = collect(tmp_path, ranks(tmp_path, 3, work))
    assert len(ended.lines) == 1
    assert ended.codes == [2, 2, 2]


def test_whom_the_others_wait_for_in_vain_is_named(tmp_path: Path) -> None:
    def work(watch: Watchdog) -> None:
        dist.barrier()
        watch.doing("training", 4)
        if dist.get_rank() == 1:
            watch.doing("reading data", 4)
            time.sleep(600)
        time.sleep(1)
        watch.doing("saving a checkpoint", 4)
        dist.all_reduce(torch.ones(1))

    ended = collect(tmp_path, ranks(tmp_path, 3, work, timeout=4))
    [line] = ended.lines
    assert "rank 1 on" in line and "at step 4 (reading data)" in line and "the others waited in vain" in line


def test_on_nccl_too_whom_the_others_wait_for_is_named(tmp_path: Path) -> None:
    """There a rank that waits hears nothing of its peers: its calls return, and its device waits."""

    def work(watch: Watchdog) -> None:
        watch.doing("reading data", 4)
        if dist.get_rank() != 1:
            time.sleep(1.5)  # longer than between two signs of life
            watch.doing("training", 4)
        time.sleep(600)

    ended = collect(tmp_path, ranks(tmp_path, 3, work, patience=2))
    [line] = ended.lines
    assert "rank 1 on" in line and "at step 4 (reading data)" in line and "(run.timeout)" in line
    assert ended.codes == [1, 1, 1]


def test_who_is_waited_for() -> None:
    """By step, then by how long it has been doing what it does; nobody where all are at the same place or one moves."""

    def seen(rank: int, step: int, doing: str, changed: float) -> RankState:
        member = RankState(None, Patience(), rank, "node", step, doing)  # type: ignore[arg-type]
        member.changed = changed
        return member

    ahead, behind = seen(0, 8, "reading data", 90.0), seen(1, 7, "evaluating", 95.0)
    assert laggard([ahead, behind], 196.0, 100) is behind  # though the other has been there for longer
    assert laggard([ahead, behind], 194.0, 100) is None
    saving = [seen(rank, 7, "saving a checkpoint", 10.0 + rank) for rank in range(3)]
    assert laggard(saving, 5000.0, 100) is None  # a checkpoint may take long, and rank 0 writes
    assert laggard([*saving, seen(3, 7, "training", 9.0)], 5000.0, 100).rank == 3  # type: ignore[union-attr]


def test_a_run_that_ends_well_says_nothing(tmp_path: Path) -> None:
    def work(watch: Watchdog) -> None:
        watch.doing("training", 1)
        time.sleep(0.7 * dist.get_rank())  # ranks do not leave together

    ended = collect(tmp_path, ranks(tmp_path, 3, work))
    assert ended.codes == [0, 0, 0], ended.output
    assert ended.output == ""


def test_a_forked_worker_does_not_hide_the_death_of_its_rank(tmp_path: Path) -> None:
    def work(watch: Watchdog) -> None:
        if dist.get_rank() == 1 and os.fork() == 0:
            (tmp_path / "worker").touch()
            time.sleep(60)
            os._exit(0)
        apart(watch)

    pids = ranks(tmp_path, 2, started(tmp_path, work), heartbeat_timeout=500)
    wait_for(tmp_path / "worker")
    os.kill(pids[1], signal.SIGKILL)
    ended = collect(tmp_path, pids)
    assert "gone without a word" in ended.lines[0]


def test_a_pause_of_ones_own_is_not_held_against_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patience = Patience()
    assert not patience.over(False, 20)
    now[0] += 3600  # suspended, or starved
    assert not patience.over(False, 20)
    for _ in range(39):
        now[0] += 0.5
        assert not patience.over(False, 20)
    now[0] += 1.0
    assert patience.over(False, 20)
    assert GRACE < 20


def flooded(connections: int, send: bytes = b"") -> tuple[int, float, int, str, bool]:
    """Strangers connect to the hub of a job of two ranks, then its ranks do. Returns (ranks welcomed, seconds until then,
    open files of the hub at most, its address, whether it still listens)."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    hub = Hub(token=7, world=2, heartbeat_timeout=20.0, timeout=60.0)
    pid = os.fork()  # with its own limit of open files: what it holds does not count for the hub
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        strangers = []
        for _ in range(connections):
            with suppress(OSError):
                strangers.append(socket.create_connection((hub.address, hub.port), timeout=0.05))
                strangers[-1].sendall(send)
        time.sleep(60)
        os._exit(0)
    try:
        wait_until(lambda: len(hub._members) > 10 or hub._strangers > 10)
        began, members = time.monotonic(), []
        for rank in range(2):
            members.append(socket.create_connection((hub.address, hub.port), timeout=30))
            members[-1].sendall(json.dumps({"token": 7, "rank": rank, "host": "here"}).encode() + b"\n")
        answers = [b"welcome" in one.recv(100) for one in members]
        seconds = time.monotonic() - began
        wait_until(lambda: not hub._listening)
        with suppress(OSError):
            socket.create_connection((hub.address, hub.port), timeout=1).close()
            return sum(answers), seconds, len(hub._members), hub.address, True
        return sum(answers), seconds, len(hub._members), hub.address, False
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("send", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"token": 8, "rank": 1}\n', b"\0" * 100_000])
def test_a_flood_of_strangers_keeps_no_rank_out(monkeypatch: pytest.MonkeyPatch, send: bytes) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    [(welcomed, seconds, members, address, listening)] = run_ranks(flooded, 1, 1500, send)
    assert welcomed == members == 2 and not listening and address == "127.0.0.1"
    assert seconds < 25, seconds  # a rank waits for ADMISSION (30 s)


@pytest.mark.parametrize(
    ("master", "local", "address"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("localhost", None, "127.0.0.1"),
        ("127.0.1.1", "2", "127.0.1.1"),  # the machine's name on Debian: right for one node,
        ("127.0.1.1", "1", "::"),  # useless for several
        ("127.0.1.1", None, "::"),
        ("192.0.2.1", None, "::"),  # a service in front of rank 0
        ("no such name", None, "::"),
    ],
)
def test_it_listens_where_ranks_can_reach_it(
    monkeypatch: pytest.MonkeyPatch, master: str, local: str | None, address: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setattr("trainer.core.distributed.world_size", lambda: 2)
    monkeypatch.setattr("trainer.core.distributed.ranks_here", lambda: None if local is None else int(local))
    with listen(backlog=2) as server:
        found = server.getsockname()[0]
    assert found == address or (address == "::" and found == "0.0.0.0") or (master == "localhost" and found == "::1")
