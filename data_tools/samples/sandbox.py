"""A second process that decodes what could cost much memory or time: killed beyond its limits, and started again.

    prepared = call("data_tools.samples.images:prepare_here", (data, options), max_memory=1536, max_seconds=10)

One a process, started when first needed; later calls cost a copy through a pipe. The operating system enforces both
limits, so they hold inside of C libraries too. Seconds are of the processor, so that a busy machine rejects no more
images than an idle one.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from data_tools.samples.reject import Reject

_WALL = 30
"""A call may take this many times its processor seconds on the clock: then the process is stuck."""
_START = "import sys; sys.path[:] = {path!r}; from data_tools.samples.sandbox import serve; serve()"


class Sandbox:
    """The process, its pipes, and the limits it was started with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.memory = 0

    def forget(self) -> None:
        """Forgets the process, which is the parent's, in a process that was forked."""
        self.lock, self.process = threading.Lock(), None

    def call(self, function: str, arguments: tuple[Any, ...], max_memory: int, max_seconds: float) -> Any:
        """What ``function`` ("module:name") returns for ``arguments``. Raises Reject: its own, or for the limits."""
        with self.lock:
            if self.process is None or self.memory != max_memory:
                self._start(max_memory)
            try:
                self._send(pickle.dumps((function, arguments, max_seconds), 5))
                kind, value = pickle.loads(self._receive(time.monotonic() + _WALL * max_seconds))
            except (OSError, EOFError) as error:
                raise Reject(self._why_it_ended(isinstance(error, TimeoutError))) from None
        if kind == "reject":
            raise Reject(*value)
        if kind == "failure":
            raise RuntimeError(f"decoding failed\n{value}")
        return value

    def close(self) -> None:
        """Ends the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin and process.stdout
            process.stdout.close()
            process.stdin.close()

    def _start(self, memory: int) -> None:
        self.close()
        path = [str(Path(__file__).parents[2]), *sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=path), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff and others print there
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )
        self.memory = memory

    def _send(self, data: bytes) -> None:
        assert self.process and self.process.stdin
        for part in (struct.pack("<Q", len(data)), memoryview(data)):
            while part:
                part = part[self.process.stdin.write(part) :]

    def _receive(self, deadline: float) -> bytearray:
        assert self.process and self.process.stdout
        pipe = self.process.stdout.fileno()
        poller = select.poll()  # not select(), which fails for descriptors above 1023
        poller.register(pipe, select.POLLIN)
        parts: list[bytearray] = []
        for size in (8, 0):
            part = bytearray(size or struct.unpack("<Q", parts[0])[0])
            view = memoryview(part)
            while view:
                if not poller.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                    raise TimeoutError
                count = os.readv(pipe, [view])
                if not count:
                    raise EOFError
                view = view[count:]
            parts.append(part)
        return parts[1]

    def _why_it_ended(self, stuck: bool) -> str:
        assert self.process
        if not stuck:
            try:
                stuck = self.process.wait(10) == -signal.SIGPROF
            except subprocess.TimeoutExpired:
                stuck = True
        self.close()
        return "too_slow" if stuck else "decoder_crashed"


_SANDBOX = Sandbox()
call = _SANDBOX.call
atexit.register(_SANDBOX.close)
os.register_at_fork(after_in_child=_SANDBOX.forget)


def inside() -> bool:
    """Whether this process is a sandbox."""
    return _INSIDE


_INSIDE = False


def serve() -> None:
    """The loop of the process: one call after another until its parent closes the pipe."""
    global _INSIDE
    _INSIDE = True
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    importlib.import_module("data_tools.samples.images")
    _limit_memory(int(sys.argv[1]) << 20)
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # whatever a library prints must not become part of a reply
        while len(head := requests.read(8)) == 8:
            reply = pickle.dumps(_answer(*pickle.loads(requests.read(struct.unpack("<Q", head)[0]))), 5)
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(struct.pack("<Q", len(reply)))
            replies.write(reply)
            replies.flush()


def answer(function: str, arguments: tuple[Any, ...], max_memory: int, max_seconds: float) -> Any:
    """What ``call`` returns, within the limits of the sandbox that this process is."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def _answer(function: str, arguments: tuple[Any, ...], seconds: float) -> tuple[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # at its end SIGPROF ends the process
    try:
        return "value", answer(function, arguments, 0, seconds)
    except Reject as reject:
        return "reject", (reject.reason, reject.path)
    except MemoryError:
        return "reject", ("too_much_memory", None)
    except Exception:  # a fault of ours: the caller raises it
        return "failure", traceback.format_exc()


def _limit_memory(size: int) -> None:
    """Lets this process allocate ``size`` bytes more than now. Linux only: others have no such limit."""
    if sys.platform != "linux":
        return
    import resource

    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + size, used + size))
