"""Advisory locks between processes: one file, one holder; the system releases the lock of a process that dies.

with FileLock(path) as lock:
    if not lock.acquire(timeout=10): raise UserError(...)
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

HELD = (errno.EAGAIN, errno.EACCES)
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
POLL = 0.1
"""Seconds between two tries."""


class FileLock:
    """An exclusive lock on the file ``path``, which is created. Released by ``close`` and by the end of the process.

    With ``inherited`` (flock), forked children share the lock until the last of them ends, and threads exclude each
    other; otherwise (POSIX record lock) it belongs to this process only. Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: str | Path, inherited: bool = True) -> None:
        self._lock = fcntl.flock if inherited else fcntl.lockf
        self.supported = True
        """False after ``acquire`` found a file system without locks."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def acquire(self, timeout: float = math.inf, on_wait: Callable[[], None] | None = None) -> bool:
        """Tries for ``timeout`` seconds; calls ``on_wait`` once if another process holds the lock. Returns whether this
        process may go on: it has the lock, or the file system has no locks (``supported`` is False)."""
        deadline = time.monotonic() + timeout
        if self._try():
            return True
        if on_wait is not None and timeout > 0:
            on_wait()
        while time.monotonic() < deadline:
            if self._try(blocking=math.isinf(timeout)):
                return True
            time.sleep(POLL)
        return False

    def _try(self, blocking: bool = False) -> bool:
        try:
            self._lock(self._descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in HELD:
                return False
            if error.errno not in UNSUPPORTED:
                raise
            self.supported = False
        return True

    def close(self) -> None:
        """Releases the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
