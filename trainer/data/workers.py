"""A pool of forked processes that return results in order; a dead or hanging one is named instead of waited for.

    with Pool(work, num=4, stall_seconds=300, describe=str) as pool:
        for result in pool.run(tasks, ahead=16): ...

Unlike the pool of data_tools (data_tools/io/workers.py), its tasks never end: they are handed out a bounded number
ahead, and a worker that hangs is named. It uses plain fork and pipes because ``multiprocessing`` does not let daemonic
processes (which launchers and tests create) have children. Bulk data goes through memory shared by the fork
(`shared_array`), which unlike /dev/shm has no small limit in containers.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.io.workers import how_it_ended, ignore_signals
from trainer.core.types import RunFailed, UserError

QUEUED = 2
"""Tasks that a worker has: one running and one waiting, so that it is never idle."""


def shared_array(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """Zeros in memory that this process shares with processes forked later."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize)), dtype=dtype, count=count).reshape(
        shape
    )


@dataclass
class Worker:
    """A worker process, seen from its parent."""

    index: int
    pid: int
    pipe: Connection
    since: float = 0.0
    """Time of its last message, or of its last task."""
    tasks: deque[tuple[int, Any]] = field(default_factory=deque)


class Pool:
    """``num`` processes that apply ``work`` to tasks."""

    def __init__(self, work: Callable[[Any], Any], num: int, stall_seconds: float, describe: Callable[[Any], str]):
        self.stall_seconds, self.describe = stall_seconds, describe
        self.workers: list[Worker] = []
        for index in range(num):
            mine, theirs = Pipe()
            pid = os.fork()
            if pid == 0:
                for sibling in self.workers:
                    sibling.pipe.close()  # otherwise a sibling would not notice the parent's death
                mine.close()
                _serve(work, theirs)
            theirs.close()
            self.workers.append(Worker(index, pid, mine))

    def run(self, tasks: Iterator[Any], ahead: int) -> Iterator[Any]:
        """Yields results in the order of ``tasks``. At most ``ahead`` tasks beyond the one just yielded are handed
        out."""
        results: dict[int, Any] = {}
        given = asked = 0
        exhausted = False
        while True:
            now = time.monotonic()
            for one in self.workers:  # the consumer may have paused for long: silence counts from here
                one.since = max(one.since, now)
            while asked not in results:
                while not exhausted and given <= asked + ahead and (worker := self._free()) is not None:
                    try:
                        task = next(tasks)
                    except StopIteration:
                        exhausted = True
                        break
                    self._give(worker, given, task)
                    given += 1
                if exhausted and asked == given:
                    return
                self._receive(results)
            result = results.pop(asked)
            if isinstance(result, Exception):  # raised in order, after the results before it
                raise result
            yield result
            asked += 1

    def _free(self) -> Worker | None:
        least = min(self.workers, key=lambda worker: len(worker.tasks))
        return least if len(least.tasks) < QUEUED else None

    def _give(self, worker: Worker, number: int, task: Any) -> None:
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.tasks.append((number, task))
        try:
            worker.pipe.send(task)
        except OSError:
            raise self._death(worker) from None

    def _receive(self, results: dict[int, Any]) -> None:
        busy = {worker.pipe: worker for worker in self.workers if worker.tasks}
        oldest = min(worker.since for worker in busy.values())
        ready = wait(list(busy), max(0.0, oldest + self.stall_seconds - time.monotonic()))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            worker = busy[pipe]
            try:
                good, value = pipe.recv()
            except (EOFError, OSError):
                raise self._death(worker) from None
            if not good:
                value = value if isinstance(value, UserError) else RuntimeError(f"data worker {worker.index}:\n{value}")
            results[worker.tasks.popleft()[0]] = value
            worker.since = time.monotonic()
        silent = [
            worker for worker in busy.values() if worker.tasks and time.monotonic() - worker.since >= self.stall_seconds
        ]
        if silent and not ready:
            raise RunFailed(
                stalled(
                    f"data worker {silent[0].index} (pid {silent[0].pid})", self.stall_seconds, self._task(silent[0])
                )
            )

    def _death(self, worker: Worker) -> RunFailed:
        _, status = os.waitpid(worker.pid, 0)
        worker.pid = 0
        code = os.waitstatus_to_exitcode(status)
        remedy = (
            "if memory ran out, lower data.workers, data.prefetch or batch.size"
            if code == -signal.SIGKILL
            else "data.workers=0 shows where"
        )
        return RunFailed(
            f"data worker {worker.index} {how_it_ended(code)} while reading {self._task(worker)}; {remedy}"
        )

    def _task(self, worker: Worker) -> str:
        return self.describe(worker.tasks[0][1])

    def kill(self) -> None:
        """Kills all processes; they have nothing to save. This also unblocks a thread inside ``run``."""
        for worker in self.workers:
            if worker.pid:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kills and reaps all processes."""
        self.kill()
        for worker in self.workers:
            worker.pipe.close()
            if worker.pid:
                with suppress(ChildProcessError):
                    os.waitpid(worker.pid, 0)
        self.workers = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stalled(who: str, seconds: float, reading: str) -> str:
    """The error for a silent worker or thread."""
    return (
        f"{who} has been silent for {seconds:g} s while reading {reading}; check that storage, or raise "
        f"data.stall_seconds"
    )


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """The main loop of a worker process. Never returns."""
    ignore_signals()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # fork does not copy threads: a parallel region would wait for them
    parent = os.getppid()
    try:
        while True:
            while not pipe.poll(5):
                if os.getppid() != parent:
                    return
            try:
                answer: tuple[bool, Any] = (True, work(pipe.recv()))
            except EOFError:
                return
            except UserError as error:
                answer = (
                    False,
                    type(error)(str(error)),
                )  # the type decides the exit code; the cause may not be picklable
            except Exception:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
    finally:
        os._exit(0)  # a fork must not run the parent's exit handlers (CUDA, DeepSpeed, pytest)
