"""Writes the shards of a plan in several processes. A worker takes the next unwritten shard; shards depend on nothing
but the plan.

Workers die with their parent: each looks for it at every row, so that a killed run leaves nobody writing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from data_tools.io.errors import AGAIN, UserError
from data_tools.io.output import Output
from data_tools.sharding.counts import Reporter, Tally
from data_tools.sharding.plan import ShardPlan
from data_tools.sharding.write_shard import write_shard


def write_shards(
    plan: ShardPlan, output: Output, shards: list[int], processes: int, strict: bool, on_tally: Callable[[Tally], None]
) -> None:
    """Writes all ``shards``. ``on_tally`` hears what happened and may raise to end the run; unfinished shards are then
    dropped.

    Raises UserError at the first reject when ``strict``, when a worker dies and when the output cannot be written;
    RuntimeError with the worker's traceback for anything that nobody foresaw.
    """
    processes = min(processes, len(shards))
    if processes <= 1:
        reporter = Reporter(on_tally)
        for shard in shards:
            write_shard(plan, output, shard, reporter, strict)
        return
    # fork: the source's table of row positions is shared, not copied; nothing here has started threads.
    context = multiprocessing.get_context("fork")
    turn = context.Value("q", 0)
    pipes: list[Connection] = []
    workers: list[multiprocessing.context.ForkProcess] = []
    try:
        for _ in range(processes):
            mine, theirs = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(plan, output, shards, turn, strict, theirs, os.getpid()), daemon=True
            )
            worker.start()
            theirs.close()
            pipes.append(mine)
            workers.append(worker)
        _listen(pipes, on_tally)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _listen(pipes: list[Connection], on_tally: Callable[[Tally], None]) -> None:
    working = list(pipes)
    while working:
        for pipe in wait(working):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except EOFError:
                remedy = "run again to continue, with fewer --processes"
                raise UserError(f"a worker died without a word (out of memory?); {remedy}") from None
            if kind == "tally":
                on_tally(value)
            elif kind == "done":
                working.remove(pipe)
            elif kind == "refused":
                raise UserError(value)
            else:
                raise RuntimeError(f"a worker failed; run again to continue\n{value}")


def _work(
    plan: ShardPlan, output: Output, shards: list[int], turn: Any, strict: bool, pipe: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    try:
        reporter = Reporter(lambda tally: pipe.send(("tally", tally)), parent)
        while True:
            with turn.get_lock():
                number = turn.value
                turn.value += 1
            if number >= len(shards):
                break
            write_shard(plan, output, shards[number], reporter, strict)
        pipe.send(("done", None))
    except UserError as error:
        pipe.send(("refused", str(error)))
    except OSError as error:  # a full disk, a lost mount: nothing of the input, which has its named outcomes
        pipe.send(("refused", f"{error}; {AGAIN}"))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # no atexit handlers of the parent
