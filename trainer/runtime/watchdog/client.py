"""Every rank's part of the watchdog."""

from __future__ import annotations

import math
import os
import secrets
import selectors
import socket
import sys
import time
from collections import deque
from dataclasses import replace
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from trainer.core import collectives, distributed
from trainer.core.types import PeerLost, RunFailed, UserError
from trainer.runtime.watchdog.protocol import (
    BEAT,
    CUT_OFF,
    DIED,
    FAILED,
    GRACE,
    HEAD_START,
    SILENT,
    SOCKETS,
    Channel,
    JobFailure,
    Patience,
)
from trainer.runtime.watchdog.server import Hub

ADMISSION = 30.0
"""Seconds that a rank waits for rank 0 to answer when the run starts."""


class Watchdog:
    """One rank's part, and on rank 0 the hub as well. Does nothing for a single rank, or when ``heartbeat_timeout`` is
    0.

    ``timeout`` is how many seconds the ranks may wait for one that has not come as far as they have.
    """

    def __init__(self, heartbeat_timeout: float, timeout: float = math.inf) -> None:
        self._heartbeat_timeout, self._timeout = heartbeat_timeout, timeout
        self._doing, self._step = "starting", 0
        self._outbox: deque[dict[str, Any]] = deque()
        self._error: BaseException | None = None
        self._zero = JobFailure(0, "?", 0, "starting", DIED, RunFailed.code)
        """What would be said if rank 0 were gone: where it was when last heard."""
        self._decided, self._welcomed = Event(), Event()
        self._hub: Hub | None = None
        self._thread: Thread | None = None

    @property
    def head_start(self) -> float:
        """Seconds by which the collectives' own timeout must lie above ``timeout``, so that rank 0 names who is missing
        before the ranks that wait are aborted."""
        return HEAD_START if self._heartbeat_timeout else 0.0

    def doing(self, what: str, step: int) -> None:
        """What this rank is about to do, in words that fit behind "at step 5"."""
        self._doing, self._step = what, step

    def __enter__(self) -> Watchdog:
        if distributed.world_size() == 1 or not self._heartbeat_timeout:
            return self
        token, port = secrets.randbits(62), 0
        if distributed.is_main():
            self._hub = Hub(token, distributed.world_size(), self._heartbeat_timeout, self._timeout)
            port = self._hub.port
        invitation = torch.tensor([token, port], device=distributed.device())
        dist.broadcast(invitation, src=0)
        token, port = invitation.tolist()
        self._line = self._connect(port)
        self._line.send({"token": token, "rank": distributed.rank(), "host": socket.gethostname()})
        self._wake, self._woken = socket.socketpair()
        SOCKETS.update((self._wake, self._woken))
        self._thread = Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        if not self._welcomed.wait(ADMISSION):
            raise self._unreachable(port, f"no answer in {ADMISSION:g} s")
        # Before all are known nobody may leave: a run that has nothing to do is over at once, and would look like a
        # death.
        collectives.barrier()
        return self

    def _connect(self, port: int) -> Channel:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self._hub is not None:
            address = self._hub.address if self._hub.address not in ("::", "0.0.0.0") else "127.0.0.1"
        try:
            return Channel(socket.create_connection((address, port), timeout=ADMISSION))
        except OSError as error:
            raise self._unreachable(port, str(error)) from error

    def _unreachable(self, port: int, why: str) -> UserError:
        return UserError(
            f"rank {distributed.rank()} on {socket.gethostname()} cannot reach rank 0 at "
            f"{os.environ.get('MASTER_ADDR', '127.0.0.1')} port {port} ({why}): let nodes connect to each other on "
            "all ports, or set run.heartbeat_timeout=0 to do without the watchdog"
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._error = error
        self._outbox.append({"bye": True} if error is None else _last_words(error))
        self._wake.send(b"!")
        if (
            error is not None
            and self._decided.wait(self._heartbeat_timeout + GRACE + 10)
            and isinstance(error, UserError)
        ):
            error.told = True  # the line has been printed
        self._thread.join(5)
        if self._hub is not None:
            self._hub.thread.join(5)
        for one in (self._wake, self._woken):
            SOCKETS.discard(one)
            one.close()

    def _run(self) -> None:
        """The thread: signs of life out, verdicts in. Ends with the run."""
        selector = selectors.DefaultSelector()
        selector.register(self._line.socket, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        clock, told, left = Patience(), 0.0, False
        while True:
            ready = [key.fileobj for key, _ in selector.select(BEAT)]
            if self._woken in ready:
                self._woken.recv(1)
            if not left and time.monotonic() - told >= BEAT:
                told = time.monotonic()
                self._line.send(self._position)
            while self._outbox:
                message = self._outbox.popleft()
                self._line.send(self._position | message)
                left = left or "bye" in message
            messages = self._line.receive() if self._line.socket in ready else []
            if clock.over(bool(messages), self._heartbeat_timeout):
                silent = replace(self._zero, cause=f"silent for {self._heartbeat_timeout:g} s: {SILENT}")
                return self._end(silent, says=distributed.rank() == 1 or distributed.local_rank() == 0)
            if messages is None:  # rank 0 closes whom it heard say goodbye
                return self._line.close() if left else self._end(self._zero, says=distributed.rank() == 1)
            for message in messages:
                if "bye" in message:
                    self._decided.set()
                    return self._line.close()
                if "welcome" in message:
                    self._welcomed.set()
                    continue
                if "failure" in message:
                    return self._end(JobFailure(**message["failure"]), says=distributed.is_main())
                self._zero = replace(self._zero, **message)

    @property
    def _position(self) -> dict[str, Any]:
        return {"step": self._step, "doing": self._doing}

    def _end(self, failure: JobFailure, says: bool) -> None:
        """Prints the line, where this is the rank to do it, and ends this process, unless it is ending by an error of
        its own already."""
        if says:
            print(failure, file=sys.stderr, flush=True)
        raises = isinstance(self._error, UserError) or (self._error is not None and failure.rank == distributed.rank())
        self._decided.set()
        self._line.close()
        if raises:
            return
        if self._hub is not None:
            self._hub.thread.join(5)  # the others are still to be told
        os._exit(failure.code)


def _last_words(error: BaseException) -> dict[str, Any]:
    """What the others are told of an exception."""
    text = " ".join(str(error).split())[:2000]
    if isinstance(error, UserError):
        return {"error": text, "kind": FAILED, "code": error.code}
    lost = isinstance(error, PeerLost | dist.DistError) or any(
        word in text for word in ("gloo/", "Connection closed by peer", "NCCL")
    )
    return {"error": f"{type(error).__name__}: {text}", "kind": CUT_OFF if lost else FAILED, "code": RunFailed.code}
