"""Rank 0's thread: receives from all ranks, picks the cause of a failure and tells everybody.

It listens only until all ranks have joined, on the address that they use. Strangers (a port scanner, another job) cost
little: few may connect at a time, they are dropped after seconds, and their number is logged.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

from trainer.core import distributed
from trainer.core.types import RunFailed
from trainer.runtime.watchdog.protocol import (
    BEAT,
    CUT_OFF,
    DIED,
    GONE,
    GRACE,
    SILENT,
    SOCKETS,
    Channel,
    JobFailure,
    Patience,
)

logger = logging.getLogger(__name__)

STRANGERS = 256
"""Connections that have not identified themselves, beyond one for each rank, before further ones wait in the
backlog."""
INTRODUCTION = 2.0
"""Seconds that a new connection has to identify itself."""


@dataclass
class RankState:
    """A rank as rank 0 sees it, or a connection that has not identified itself (rank -1)."""

    channel: Channel
    patience: Patience
    rank: int = -1
    host: str = ""
    step: int = 0
    doing: str = "starting"
    changed: float = 0.0
    """When ``step`` or ``doing`` last changed."""
    heard: bool = False
    """Whether it has sent anything since silence was last checked."""

    def move(self, step: int, doing: str) -> None:
        if (step, doing) != (self.step, self.doing):
            self.step, self.doing, self.changed = step, doing, time.monotonic()


def place(member: RankState) -> tuple[int, float]:
    """The progress of a rank: its step, then when its activity began. All ranks take the same course."""
    return member.step, member.changed


def laggard(members: list[RankState], now: float, timeout: float) -> RankState | None:
    """The rank that the others wait for: the one that is furthest behind, if none has progressed for ``timeout``
    seconds.

    None if all are at the same point: any of them may be computing, and nothing tells which one hangs.
    """
    if len({(member.step, member.doing) for member in members}) < 2:
        return None
    if now - max(member.changed for member in members) <= timeout:
        return None
    return min(members, key=place)


def waited_in_vain(member: RankState, now: float, why: str) -> str:
    return f"it has been there for {now - member.changed:.0f} s and the others waited in vain ({why})"


@dataclass(frozen=True)
class Trouble:
    """A failure of a member."""

    kind: int
    member: RankState
    cause: str
    code: int


class Hub:
    """Rank 0's thread: receives from all ranks and decides."""

    def __init__(self, token: int, world: int, heartbeat_timeout: float, timeout: float) -> None:
        self._token, self._world, self._heartbeat_timeout, self._timeout = token, world, heartbeat_timeout, timeout
        self._server = listen(backlog=world)
        self.address, self.port = self._server.getsockname()[:2]
        SOCKETS.add(self._server)
        self._joined = self._strangers = 0
        self._listening = self._accepting = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._members: dict[socket.socket, RankState] = {}
        self._troubles: dict[int, Trouble] = {}
        """By rank, in the order of arrival."""
        self._over = False
        self.thread = Thread(target=self._run, name="watchdog hub", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        told, deadline = time.monotonic(), 0.0
        while not self._over:
            for key, _ in self._selector.select(BEAT / 2):
                if key.fileobj is self._server:
                    self._welcome()
                elif key.fileobj in self._members:
                    self._hear(self._members[key.fileobj])
            now = time.monotonic()
            if self._listening:
                self._admit(now)
            if now - told >= BEAT:
                told = now
                self._tell(
                    next(
                        (
                            {"host": m.host, "step": m.step, "doing": m.doing}
                            for m in self._members.values()
                            if m.rank == 0
                        ),
                        {},
                    )
                )
                self._look_for_silence()
                self._look_for_waiting(now)
            if self._troubles:
                deadline = deadline or now + GRACE
                if now >= deadline or len(self._troubles) == self._world:
                    self._tell({"failure": asdict(self._judge())})
                    break
        self._close()

    def _welcome(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # too many open files, or the peer is gone: the others wait in the backlog
            return self._pause_accepting()
        self._members[connection] = RankState(Channel(connection), Patience(), changed=time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._members) >= self._world + STRANGERS:
            self._pause_accepting()
        return None

    def _pause_accepting(self) -> None:
        """Until ``_admit`` has dropped strangers; a socket that is ready but not accepted would keep the thread
        busy."""
        if self._accepting:
            self._selector.unregister(self._server)
            self._accepting = False

    def _admit(self, now: float) -> None:
        """Drops connections that have not identified themselves in time, and stops listening when all ranks have."""
        complete = self._joined == self._world
        for member in list(self._members.values()):
            if member.rank < 0 and (complete or now - member.changed > INTRODUCTION):
                self._drop_stranger(member)
        if complete:
            self._stop_listening()
        elif not self._accepting:
            self._selector.register(self._server, selectors.EVENT_READ)
            self._accepting = True

    def _drop_stranger(self, member: RankState) -> None:
        self._strangers += 1
        self._forget(member)

    def _stop_listening(self) -> None:
        self._pause_accepting()
        self._listening = False
        SOCKETS.discard(self._server)
        self._server.close()
        if self._strangers:
            logger.warning(
                f"watchdog: dropped {self._strangers} connections to port {self.port} that are not this job's"
            )

    def _hear(self, member: RankState) -> None:
        messages = member.channel.receive()
        member.heard = True
        for message in messages or []:
            if member.rank < 0:
                if message.get("token") != self._token:
                    return self._drop_stranger(member)
                member.rank, member.host = int(message["rank"]), str(message["host"])
                self._joined += 1
                member.channel.send({"welcome": True})
                continue
            member.move(int(message["step"]), str(message["doing"]))
            if "error" in message:
                self._trouble(Trouble(int(message["kind"]), member, str(message["error"]), int(message["code"])))
            if "bye" in message:
                self._forget(member)
                if member.rank == 0:
                    self._tell({"bye": True})
                    self._over = True
                return None
        if messages is None:
            if member.rank < 0:
                return self._drop_stranger(member)
            self._trouble(Trouble(GONE, member, DIED, RunFailed.code))
            self._forget(member)
        return None

    def _trouble(self, trouble: Trouble) -> None:
        """Records it; if a rank reports an error and then dies, its report counts."""
        self._troubles.setdefault(trouble.member.rank, trouble)

    def _look_for_silence(self) -> None:
        for member in list(self._members.values()):
            over = member.patience.over(member.heard, self._heartbeat_timeout)
            member.heard = False
            if over and member.rank > 0:
                self._trouble(
                    Trouble(GONE, member, f"silent for {self._heartbeat_timeout:g} s: {SILENT}", RunFailed.code)
                )
                self._forget(member)

    def _look_for_waiting(self, now: float) -> None:
        """NCCL does not tell a rank that it waits for one that never comes: rank 0 sees it from their positions."""
        members = [member for member in self._members.values() if member.rank >= 0]
        late = laggard(members, now, self._timeout)
        if late is not None:
            self._trouble(Trouble(GONE, late, waited_in_vain(late, now, "run.timeout"), RunFailed.code))

    def _judge(self) -> JobFailure:
        first = min(self._troubles.values(), key=lambda trouble: trouble.kind)  # the earliest of equals
        member, cause = first.member, first.cause
        hanging = [one for one in self._members.values() if one.rank >= 0 and one.rank not in self._troubles]
        if first.kind == CUT_OFF and hanging:  # the others gave up waiting for it
            member = min(hanging, key=place)
            cause = waited_in_vain(member, time.monotonic(), cause)
        return JobFailure(member.rank, member.host, member.step, member.doing, cause, first.code)

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members.values():
            if member.rank >= 0:
                member.channel.send(message)

    def _forget(self, member: RankState) -> None:
        self._selector.unregister(member.channel.socket)
        del self._members[member.channel.socket]
        member.channel.close()

    def _close(self) -> None:
        """Reads from all first: closing a connection with unread data would discard what was sent on it."""
        for member in self._members.values():
            with suppress(OSError):
                member.channel.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 3
        while any(member.rank >= 0 for member in self._members.values()) and time.monotonic() < deadline:
            for key, _ in self._selector.select(BEAT):
                member_ = self._members.get(key.fileobj)  # type: ignore[call-overload]
                if member_ is not None and member_.channel.receive() is None:
                    self._forget(member_)
        for member in list(self._members.values()):
            self._forget(member)
        if self._listening:
            self._stop_listening()
        self._selector.close()


def listen(backlog: int) -> socket.socket:
    """A server socket at a free port of MASTER_ADDR, which the ranks of other nodes connect to.

    It listens on all interfaces if MASTER_ADDR is not an address of this machine (but of a proxy or a service), or if a
    name resolves to a loopback address here (/etc/hosts on Debian) while the job may have other nodes.
    """
    name = os.environ.get("MASTER_ADDR", "127.0.0.1")
    alone = name in ("localhost", "127.0.0.1", "::1") or distributed.ranks_here() == distributed.world_size()
    with suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
            if alone or not ipaddress.ip_address(address[0]).is_loopback:
                with suppress(OSError):
                    return socket.create_server(address, family=family, backlog=backlog)
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=backlog, dualstack_ipv6=dual
    )
