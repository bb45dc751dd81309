"""Runs one function over many items in forked processes, for ``shard``, ``verify``, ``stats``, ``dedup``, ``filter``
and ``glyphs``.

    for result in run_workers(lambda item, send: work(item), items, processes=8): ...

Training has its own pool (trainer/data/workers.py): its tasks never end, are handed out a bounded number ahead, and a
worker that hangs must be named. Both use ``ignore_signals`` and ``how_it_ended``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from data_tools.io.errors import AGAIN, UserError

T = TypeVar("T")
R = TypeVar("R")
Send = Callable[[Any], None]


def run_workers(
    work: Callable[[T, Send], R], items: Sequence[T], processes: int, on_message: Send = lambda _: None
) -> Iterator[R]:
    """Calls ``work(item, send)`` for every item and yields the results in the order of ``items``.

    What ``work`` sends is passed to ``on_message`` in this process at once; ``on_message`` may raise to end the run.
    Results and messages are pickled. With one process everything runs here. Raises UserError if ``work`` raises it, if
    ``work`` raises OSError (a full disk, a lost mount), or if a worker is killed; RuntimeError with the worker's
    traceback for other errors.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        for item in items:
            yield work(item, on_message)
        return
    # fork: objects that ``work`` refers to are shared, not copied
    context = multiprocessing.get_context("fork")
    turn = context.Value("q", 0)
    workers: dict[Connection, multiprocessing.context.ForkProcess] = {}
    try:
        for _ in range(processes):
            mine, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_serve, args=(work, items, turn, theirs, os.getpid()), daemon=True)
            worker.start()
            theirs.close()
            workers[mine] = worker
        yield from _results(dict(workers), on_message)
    finally:
        for pipe, worker in workers.items():
            worker.kill()
            worker.join()
            pipe.close()


def _results(working: dict[Connection, multiprocessing.context.ForkProcess], on_message: Send) -> Iterator[Any]:
    results: dict[int, Any] = {}
    asked = 0
    while working:
        for pipe in wait(list(working)):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except EOFError:
                working[pipe].join()
                how = how_it_ended(working[pipe].exitcode or 0)
                raise UserError(
                    f"a worker process {how}; run again, with fewer --processes if memory ran out"
                ) from None
            if kind == "message":
                on_message(value)
            elif kind == "result":
                number, results[number] = value
            elif kind == "done":
                del working[pipe]
            elif kind == "user error":
                raise UserError(value)
            else:
                raise RuntimeError(f"a worker failed\n{value}")
        while asked in results:
            yield results.pop(asked)
            asked += 1


def _serve(work: Callable[[Any, Send], Any], items: Sequence[Any], turn: Any, pipe: Connection, parent: int) -> None:
    """The main loop of a worker process: takes the next item until there is none. Never returns."""
    ignore_signals()

    def send(kind: str, value: Any) -> None:
        if os.getppid() != parent:  # the run was killed: stop writing
            os._exit(1)
        pipe.send((kind, value))

    try:
        while True:
            with turn.get_lock():
                number = turn.value
                turn.value += 1
            if number >= len(items):
                break
            send("result", (number, work(items[number], lambda message: send("message", message))))
        send("done", None)
    except UserError as error:
        send("user error", str(error))
    except OSError as error:
        send("user error", f"{error}; {AGAIN}")
    except Exception:
        send("failure", traceback.format_exc())
    finally:
        pipe.close()
        os._exit(0)  # without the parent's atexit handlers


def ignore_signals() -> None:
    """Has a worker ignore signals: schedulers, Ctrl-C and closing terminals signal whole process trees, but the parent
    decides when a worker ends (with SIGKILL)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def how_it_ended(exitcode: int) -> str:
    """-9 -> "was killed by SIGKILL"; 3 -> "ended with code 3"."""
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with code {exitcode}"
