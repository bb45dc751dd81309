"""One job a run directory: the ranks of a start that was thought dead must not write beside those of the next.

with RunLock(run_dir):        # every rank; rank 0 holds it to the end, or until its process ends, however it ends
    ...
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

from trainer.core.collectives import on_main
from trainer.core.distributed import say
from trainer.core.types import RunFailed, UserError

PATIENCE = 60.0
"""Seconds for those before to finish their step, save and go."""
NOT_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Answers of file systems without locks: there the directory is trusted."""
MISTAKES = (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG)
"""Answers that the same command would get again."""


class RunLock:
    """A POSIX lock on ``<run>/lock``: it belongs to the process (forked workers do not inherit it) and works over NFS.

    Entering it raises RunFailed on all ranks when another job keeps it for longer than ``patience`` seconds.
    """

    def __init__(self, run_dir: Path, patience: float = PATIENCE) -> None:
        self._run_dir, self._patience, self._handle = run_dir, patience, -1

    def __enter__(self) -> RunLock:
        on_main(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def _take(self) -> dict[str, Any]:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno not in MISTAKES:
                raise
            raise UserError(
                f"run.directory {self._run_dir} is no directory that can be written to ({error}); choose another"
            ) from error
        deadline = time.monotonic() + self._patience
        said = False
        while True:
            try:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return {}
            except OSError as error:
                if error.errno in NOT_HERE:
                    return {}
                if time.monotonic() > deadline:
                    raise RunFailed(
                        f"{self._run_dir}: another job is training there; end it, or choose another run.directory"
                    ) from error
            if not said:
                said = True
                say(
                    f"{self._run_dir}: another job is training there; waiting up to {self._patience:.0f} s for it to "
                    f"end"
                )
            time.sleep(0.2)
