"""Rank 0's thread that hears all ranks, picks the cause of a failure and tells everybody."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

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


@dataclass
class RankState:
    """A rank as rank 0 sees it."""

    channel: Channel
    patience: Patience
    rank: int = -1
    host: str = ""
    step: int = 0
    doing: str = "starting"
    changed: float = 0.0
    """When ``step`` or ``doing`` last did."""
    heard: bool = False
    """Since silence was last looked for."""

    def move(self, step: int, doing: str) -> None:
        if (step, doing) != (self.step, self.doing):
            self.step, self.doing, self.changed = step, doing, time.monotonic()


def place(member: RankState) -> tuple[int, float]:
    """How far a rank has come: its step, then since when it does what it does there. All ranks go the same way."""
    return member.step, member.changed


def laggard(members: list[RankState], now: float, timeout: float) -> RankState | None:
    """The rank that the others wait for: the one that has come least far, once nobody has moved for ``timeout``
    seconds.

    None where all are at the same place: each may be computing, and nothing tells who is not.
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
    """Something that happened to a member."""

    kind: int
    member: RankState
    cause: str
    code: int


class Hub:
    """Rank 0's thread that hears all ranks and decides."""

    def __init__(self, token: int, world: int, heartbeat_timeout: float, timeout: float) -> None:
        self._token, self._world, self._heartbeat_timeout, self._timeout = token, world, heartbeat_timeout, timeout
        dual = socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=world, dualstack_ipv6=dual
        )
        self.port = int(self._server.getsockname()[1])
        SOCKETS.add(self._server)
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
                else:
                    self._hear(self._members[key.fileobj])  # type: ignore[index]
            now = time.monotonic()
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
        connection, _ = self._server.accept()
        self._members[connection] = RankState(Channel(connection), Patience(), changed=time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, member: RankState) -> None:
        messages = member.channel.receive()
        member.heard = True
        for message in messages or []:
            if member.rank < 0:
                if message.get("token") != self._token:
                    return self._forget(member)  # a stranger: a port scanner, another job
                member.rank, member.host = int(message["rank"]), str(message["host"])
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
            if member.rank >= 0:
                self._trouble(Trouble(GONE, member, DIED, RunFailed.code))
            self._forget(member)
        return None

    def _trouble(self, trouble: Trouble) -> None:
        """Notes it; a rank's last words stand when it is gone after them."""
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
        """On NCCL nothing tells a rank that it waits for one that never comes: rank 0 sees it by their positions."""
        members = [member for member in self._members.values() if member.rank >= 0]
        late = laggard(members, now, self._timeout)
        if late is not None:
            self._trouble(Trouble(GONE, late, waited_in_vain(late, now, "run.timeout"), RunFailed.code))

    def _judge(self) -> JobFailure:
        first = min(self._troubles.values(), key=lambda trouble: trouble.kind)  # of equals the earliest
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
        """Hears everybody out first: closing a connection with something unread in it would take back what was sent."""
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
        self._selector.close()
        SOCKETS.discard(self._server)
        self._server.close()
