"""What the two ends of a connection share: lines of JSON, patience, and the words for what went wrong."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

BEAT = 0.5
"""Seconds between two signs of life."""
GRACE = 1.0
"""Seconds that rank 0 collects what belongs to one failure before it names the cause."""
HEAD_START = 60.0
"""Seconds between the timeout by which rank 0 judges and that of the collectives themselves."""
LONGEST_LINE = 65536
GONE, FAILED, CUT_OFF = range(3)
"""How near an event is to the cause: a process without last words, an error of its own, an error in talking to
others."""


@dataclass(frozen=True)
class JobFailure:
    """Why the job ends."""

    rank: int
    host: str
    step: int
    doing: str
    cause: str
    code: int
    """Exit code of the ranks that it ends."""

    def __str__(self) -> str:
        return f"error: rank {self.rank} on {self.host} at step {self.step:,} ({self.doing}): {self.cause}"


class Channel:
    """JSON objects, a line each, over one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer that reads nothing must not hold up the others: it is as good as silent.
        connection.settimeout(BEAT)
        SOCKETS.add(connection)

    def send(self, message: dict[str, Any]) -> None:
        """Drops the message when the peer is gone: whoever waits for its words will notice."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None when the peer has closed."""
        try:
            data = self.socket.recv(LONGEST_LINE)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data or len(self._rest) > LONGEST_LINE:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        SOCKETS.discard(self.socket)
        self.socket.close()


SOCKETS: set[socket.socket] = set()


def _close_in_child() -> None:
    """A data worker that outlives its rank must not keep the rank's connection open."""
    for one in SOCKETS:
        one.close()
    SOCKETS.clear()


os.register_at_fork(after_in_child=_close_in_child)


DIED = (
    "its process is gone without a word: killed, out of memory, or crashed (see its own output, and dmesg on "
    "that machine)"
)
SILENT = "its machine, the network or the whole process hangs"


class Patience:
    """Since when nothing was heard. A pause of this very process is not held against the others."""

    def __init__(self) -> None:
        self._heard = self._asked = time.monotonic()

    def over(self, heard: bool, limit: float) -> bool:
        """Call it at least once in BEAT seconds: whether more than ``limit`` have gone by."""
        now = time.monotonic()
        paused = now - self._asked > 4 * BEAT
        self._asked = now
        if heard or paused:
            self._heard = now
        return now - self._heard > limit
