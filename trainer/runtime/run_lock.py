"""One job per run directory: ranks of an earlier start that are still alive must not write beside those of a new one.

with RunLock(run_dir):        # on every rank; rank 0 holds the lock until its process ends
    ...
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

from data_tools.io.lock import FileLock
from trainer.core.collectives import on_main
from trainer.core.types import RunFailed, UserError

logger = logging.getLogger(__name__)


PATIENCE = 60.0
"""Seconds for an earlier job to finish its step, save and exit."""
MISTAKES = (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG)
"""Errors that the same command would get again."""


class RunLock:
    """A POSIX lock on ``<run>/lock``: it belongs to the process (forked workers do not inherit it) and works over NFS.

    Raises RunFailed on all ranks if another job holds it for longer than ``patience`` seconds.
    """

    def __init__(self, run_dir: Path, patience: float = PATIENCE) -> None:
        self._run_dir, self._patience = run_dir, patience
        self._lock: FileLock | None = None

    def __enter__(self) -> RunLock:
        on_main(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take(self) -> dict[str, Any]:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._run_dir / "lock", inherited=False)
        except OSError as error:
            if error.errno not in MISTAKES:
                raise
            raise UserError(
                f"run.directory {self._run_dir} is not a writable directory ({error}); choose another"
            ) from error
        waiting = f"{self._run_dir}: another job is training there; waiting up to {self._patience:.0f} s for it to end"
        if not self._lock.acquire(self._patience, on_wait=lambda: logger.info(waiting)):
            raise RunFailed(f"{self._run_dir}: another job is training there; stop it, or choose another run.directory")
        return {}
