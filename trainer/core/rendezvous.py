"""Rendezvous at rank 0's address. Missing ranks are named after seconds, not only after the timeout.

store, rank, world = meet(timedelta(minutes=10))      # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist

from trainer.core.logs import EVERY_RANK
from trainer.core.types import RunFailed

logger = logging.getLogger(__name__)


FIRST_LINE = 10.0
"""Seconds to wait before the first message."""
NEXT_LINES = 60.0
HOSTS = "RINGLIP_HOSTS"
"""Names of the nodes with their numbers of ranks, "node-a:8 node-b:8", in the order of ranks (launch/multinode.sh)."""


@contextmanager
def meeting(timeout: timedelta) -> Iterator[tuple[dist.Store, int, int]]:
    """Yields (store, rank, world size); the block creates the process group, which waits for every rank.

    Raises RunFailed that names the missing ranks, or the address at which rank 0 does not answer.
    """
    arrivals = _Arrivals(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)
    arrivals.start()
    try:
        yield next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise RunFailed(
                f"port {arrivals.port} of {arrivals.host} is in use: stop the ranks of an earlier start if some are "
                "left, "
                "or take another (deepspeed --master_port N, torchrun --master-port N)"
            ) from error
        raise RunFailed(arrivals.unreachable()) from error
    except dist.DistStoreError as error:
        raise RunFailed(arrivals.incomplete()) from error
    finally:
        arrivals.stop()


class _Arrivals(threading.Thread):
    """Runs during the rendezvous: registers this rank at rank 0 and prints which ranks are missing."""

    def __init__(self, rank: int, world: int, timeout: timedelta) -> None:
        super().__init__(name="rendezvous", daemon=True)
        self.rank, self.world, self.timeout = rank, world, timeout
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.done = threading.Event()
        self.store: dist.Store | None = None
        self.connected = threading.Event()

    def run(self) -> None:
        threading.Thread(target=self._connect, daemon=True).start()
        pause = FIRST_LINE
        while not self.done.wait(pause):
            pause = NEXT_LINES
            if self.rank == 0 and self.connected.is_set():
                self._print(self.incomplete())
            elif not self.connected.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
                self._print(self.unreachable())

    def _connect(self) -> None:
        # multi_tenant shares the rendezvous's own server. torchrun's agents run one themselves.
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = dist.TCPStore(
                self.host, self.port, None, serves, self.timeout, wait_for_workers=False, multi_tenant=True
            )
            store.set(f"arrived/{self.rank}", socket.gethostname())
        except dist.DistError:
            return  # the rendezvous fails too, and reports why
        self.store = store
        self.connected.set()

    def stop(self) -> None:
        self.done.set()

    def unreachable(self) -> str:
        """The message of a rank that cannot reach rank 0."""
        return (
            f"rank {self.rank} on {socket.gethostname()} cannot reach rank 0 at {self.host}:{self.port}: is the first "
            "node "
            "up, "
            "its name right and the port open?"
        )

    def incomplete(self) -> str:
        """The message of rank 0 while ranks are missing: how many have connected, which are missing."""
        if self.rank or self.store is None:
            return f"rank {self.rank} on {socket.gethostname()}: other ranks are missing; rank 0 names them"
        hosts = {rank: self._host(rank) for rank in range(self.world)}
        here = {rank: host for rank, host in hosts.items() if host}
        missing = [rank for rank, host in hosts.items() if not host]
        if not missing:
            return (
                f"all {self.world} ranks have connected to {self.host}:{self.port}, but not all to each other: "
                "let "
                "the nodes connect to each other on all ports"
            )
        names = _names_of_nodes()
        missing_by_node = [
            f"{_spans(ranks)}{f' of {node}' if node else ''}" for node, ranks in _by_node(missing, names)
        ]
        return (
            f"{len(here)} of {self.world} ranks have connected to {self.host}:{self.port} (from "
            f"{', '.join(sorted(set(here.values())))}); missing: rank {', rank '.join(missing_by_node)}. Look at the "
            f"output of those nodes; `python -m trainer.doctor --hostfile F` checks them"
        )

    def _host(self, rank: int) -> str:
        assert self.store is not None
        key = f"arrived/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _print(self, text: str) -> None:
        logger.info(f"waiting: {text}", extra=EVERY_RANK)


def _names_of_nodes() -> list[str]:
    """The node of each rank, if the launch script has set HOSTS."""
    names: list[str] = []
    for entry in os.environ.get(HOSTS, "").split():
        name, _, slots = entry.rpartition(":")
        names += [name] * int(slots)
    return names


def _by_node(ranks: list[int], names: list[str]) -> list[tuple[str, list[int]]]:
    named = [(names[rank] if rank < len(names) else "", rank) for rank in ranks]
    return [(node, [rank for _, rank in group]) for node, group in groupby(named, key=lambda pair: pair[0])]


def _spans(ranks: list[int]) -> str:
    """[2, 3, 4, 7] -> "2-4, 7"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
