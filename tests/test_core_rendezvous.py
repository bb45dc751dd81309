"""Ranks that meet, and what is printed while one is missing."""

import multiprocessing
import os
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.clusters import free_port
from trainer.core import rendezvous
from trainer.core.types import RunFailed


def arrive(rank: int, world: int, port: int, seconds: float, answers: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.update({"MASTER_PORT": str(port), rendezvous.HOSTS: "node-a:2 node-b:3"})
    rendezvous.FIRST_LINE = 0.5
    try:
        timeout = timedelta(seconds=seconds)
        with rendezvous.meeting(timeout) as (store, _, _):
            store.set_timeout(timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        answers.put((rank, (dist.get_rank(), dist.get_world_size())))
    except RunFailed as error:
        answers.put((rank, str(error)))
    answers.close()
    answers.join_thread()
    os._exit(0)


def meeting(ranks: list[int], world: int, seconds: float) -> dict[int, Any]:
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=arrive, args=(rank, world, port, seconds, answers)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=60) for _ in ranks)
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_all_ranks_meet() -> None:
    assert meeting([0, 1, 2], 3, 30) == {rank: (rank, 3) for rank in range(3)}


def test_missing_ranks_are_named_with_their_nodes(capfd: pytest.CaptureFixture[str]) -> None:
    answers = meeting([0, 2], 5, 3)
    assert "2 of 5 ranks have connected" in answers[0]
    assert "missing: rank 1 of node-a, rank 3-4 of node-b." in answers[0]
    assert "rank 0 names them" in answers[2]
    assert "waiting: " in capfd.readouterr().err  # before the timeout


def test_an_address_where_nobody_listens_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    answers = meeting([1], 2, 3)
    assert "rank 1 on" in answers[1]
    assert "cannot reach rank 0 at 127.0.0.1:" in capfd.readouterr().err
