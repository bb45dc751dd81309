"""Real ranks for tests: forked processes with torch already imported, meeting over gloo through a file.

    results = run_ranks(work, 4, argument)      # [work(argument) on rank 0, ... on rank 3]

``work`` runs with the process group up (``torch.distributed`` and RANK, WORLD_SIZE, LOCAL_RANK set); what it returns
travels back by pickle between our own processes. A rank that raises, dies or hangs fails the test with its own
traceback instead of hanging the rest.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# fork() copies no threads: ranks are started from a process that has never run a parallel region.
torch.set_num_threads(1)


def run_ranks(work: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Runs ``work(*args)`` on ``world`` forked ranks and returns their results in rank order."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(work, rank, world, f"{folder}/meet", timeout, theirs, args), daemon=True
            )
            gc.freeze()  # a collection in the rank would otherwise copy every page of the parent's heap
            process.start()
            gc.unfreeze()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(2)
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {silent} said nothing for {timeout} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if not ok:
                raise AssertionError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    work: Callable[..., Any], rank: int, world: int, meet: str, timeout: float, pipe: Connection, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    # Shows in the test's captured stderr what a rank was doing that says nothing.
    faulthandler.dump_traceback_later(0.9 * timeout, file=sys.__stderr__)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        # Plain pickle: a pipe's own sends tensors through shared memory that dies with this rank.
        pipe.send_bytes(pickle.dumps((True, work(*args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()
        os._exit(0)  # no atexit handlers of the parent (pytest, deepspeed) in a forked rank
