"""What happens to the runs of tests/chaos.py: each function does one thing to a start, after which its ranks must end by
themselves. ``run.after``, where it is set, is called when they have.

Faults that a run must survive (a pause, strangers on its ports) let it make some steps first and kill a rank then.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.chaos import Chaos, Start

Fault = Callable[["Chaos", "Start"], None]
GARBAGE = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, b"\xff" * 64, b'{"rank": 0}\n')


def kill_rank(run: Chaos, start: Start) -> None:
    os.kill(run.dice.choice(start.ranks), signal.SIGKILL)


def kill_launcher(run: Chaos, start: Start) -> None:
    os.kill(start.launcher, signal.SIGKILL)


def kill_worker(run: Chaos, start: Start) -> None:
    """The process that reads and decodes for a rank."""
    os.kill(run.dice.choice(psutil.Process(run.dice.choice(start.ranks)).children()).pid, signal.SIGKILL)


def stop_signal(run: Chaos, start: Start) -> None:
    os.kill(run.dice.choice(start.ranks), run.dice.choice([signal.SIGTERM, signal.SIGUSR1]))


def stop_signal_at_once(run: Chaos, start: Start) -> None:
    """Anywhere in start-up: before the process group, while the model is built, in the first step."""
    time.sleep(run.dice.uniform(0, 2))
    for rank in start.ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)


def kill_while_saving(run: Chaos, start: Start) -> None:
    run.until(start, lambda: bool(list((run.directory / "checkpoints").glob(".samples-*.partial"))))
    os.kill(start.ranks[0], signal.SIGKILL)


def stop_signal_while_saving(run: Chaos, start: Start) -> None:
    run.until(start, lambda: bool(list((run.directory / "checkpoints").glob(".samples-*.partial"))))
    os.kill(run.dice.choice(start.ranks), signal.SIGTERM)


def stop_signal_in_evaluation(run: Chaos, start: Start) -> None:
    """The run evaluates after every step, so that most of its time is evaluation."""
    time.sleep(run.dice.uniform(0, 0.1))
    os.kill(run.dice.choice(start.ranks), signal.SIGTERM)


def truncate(run: Chaos, start: Start) -> None:
    """A file of the newest checkpoint loses its second half."""
    _damage_newest(run, start, lambda content: content[: len(content) // 2])


def flip(run: Chaos, start: Start) -> None:
    """A bit of a file of the newest checkpoint is flipped."""

    def flipped(content: bytes) -> bytes:
        at = run.dice.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << run.dice.randrange(8)]) + content[at + 1 :]

    _damage_newest(run, start, flipped)


def _damage_newest(run: Chaos, start: Start, change: Callable[[bytes], bytes]) -> None:
    run.until(start, lambda: len(list((run.directory / "checkpoints").glob("samples-*/checkpoint.json"))) >= 2)
    kill_rank(run, start)

    def damage() -> None:
        newest = max((run.directory / "checkpoints").glob("samples-*"))
        path = run.dice.choice(sorted(newest.iterdir()))
        path.write_bytes(change(path.read_bytes()))

    run.after = damage


def fill_disk(run: Chaos, start: Start) -> None:
    """Not a byte is left: checkpoints fail and training continues. Then a rank dies, and somebody frees the space."""
    assert run.disk is not None
    filler = run.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    run.makes_steps(start, 3)
    kill_rank(run, start)
    run.after = filler.unlink


def pause(run: Chaos, start: Start) -> None:
    """A rank or all of them stand still (SIGSTOP), as when a machine suspends or swaps."""
    victims = run.dice.choice([start.ranks, [run.dice.choice(start.ranks)]])
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(run.dice.uniform(1, 4))
    for pid in victims:
        os.kill(pid, signal.SIGCONT)
    run.makes_steps(start, 1)
    kill_rank(run, start)


def pause_worker(run: Chaos, start: Start) -> None:
    worker = run.dice.choice(psutil.Process(run.dice.choice(start.ranks)).children())
    worker.suspend()
    time.sleep(run.dice.uniform(1, 3))
    worker.resume()
    run.makes_steps(start, 1)
    kill_rank(run, start)


def starve(run: Chaos, start: Start) -> None:
    """A rank may not take any more memory (ulimit -v, a container's limit)."""
    victim = psutil.Process(run.dice.choice(start.ranks))
    limit = victim.memory_info().vms + 2**20
    victim.rlimit(psutil.RLIMIT_AS, (limit, limit))
    time.sleep(run.dice.uniform(0.2, 1))
    with suppress(ProcessLookupError):  # so small a model may need no more
        os.kill(victim.pid, signal.SIGKILL)


def strangers(run: Chaos, start: Start) -> None:
    """Port scanners, other jobs and floods on every port that a rank listens on."""
    held = []
    for pid in start.ranks:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                for _ in range(100):
                    with suppress(OSError):
                        held.append(socket.create_connection(("127.0.0.1", connection.laddr.port), timeout=0.5))
                        held[-1].sendall(run.dice.choice(GARBAGE))
    run.makes_steps(start, 1)
    for one in held:
        one.close()
    run.makes_steps(start, 1)
    kill_rank(run, start)


def second_start(run: Chaos, start: Start) -> None:
    """Somebody starts the run again while it trains: the second start waits and goes on when the first has died."""
    second = run.start()
    time.sleep(run.dice.uniform(0.5, 3))
    assert second.alive(), run.output.read_text()[-2000:]
    kill_rank(run, start)
    start.end()
    run.makes_steps(second, 2)
    kill_rank(run, second)
    second.end()


def missing_shard(run: Chaos, start: Start) -> None:
    """A shard is gone at the next start, which says so and ends; then it is there again."""
    kill_rank(run, start)

    def lose() -> None:
        [*_, tar] = sorted(run.shards.rglob("*.tar"))
        kept = tar.rename(tar.with_suffix(".kept"))
        before = len(run.output.read_text())
        run.start().end()
        said = run.output.read_text()[before:]
        assert f"{tar}: no such shard" in said, said
        kept.rename(tar)

    run.after = lose


def taken_port(run: Chaos, start: Start) -> None:
    """Another program has the port of the next start, whose rank 0 says so and ends (launchers then end the others)."""
    kill_rank(run, start)

    def take() -> None:
        with socket.create_server(("", 0)) as other:
            before = len(run.output.read_text())
            run.start(world=1, port=other.getsockname()[1]).end()
            said = run.output.read_text()[before:]
            assert "is in use" in said, said

    run.after = take


def edited_recipe(run: Chaos, start: Start) -> None:
    """Between two starts somebody changes what may change: how often is saved and logged, how many are kept."""
    kill_rank(run, start)
    run.extra = [f"checkpoint.keep={run.dice.choice([2, 3, 4])}", f"checkpoint.every={run.dice.choice([32, 48])}"]


FAULTS: list[Fault] = [
    kill_rank, kill_launcher, kill_worker, stop_signal, stop_signal_at_once, kill_while_saving,
    stop_signal_while_saving, stop_signal_in_evaluation, truncate, flip, fill_disk, pause, pause_worker, starve, strangers, second_start,
    missing_shard, taken_port, edited_recipe,
]  # fmt: skip
NEEDS_DISK = {fill_disk}
AT_ONCE = {stop_signal_at_once}


def overrides(fault: Fault, shards: Path) -> list[str]:
    """What a start needs for a fault to be possible."""
    if fault in (kill_worker, pause_worker):
        return ["data.workers=1", "data.cache_decoded=0"]
    if fault is stop_signal_in_evaluation:
        return [f"data.validation={shards}", "eval.every=16"]
    return []


def plan(dice: random.Random, count: int, disk: bool, kinds: list[Fault]) -> list[Fault]:
    """``count`` faults in random order, each kind before any comes again."""
    able = [fault for fault in kinds if disk or fault not in NEEDS_DISK]
    found: list[Fault] = []
    while len(found) < count:
        found += dice.sample(able, len(able))
    return found[:count]
