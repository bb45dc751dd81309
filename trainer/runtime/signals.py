"""Signals that stop a run in order: the step is finished, a checkpoint saved, and the exit code means "start again".

    with StopSignals() as signals:
        ...
        if signals.agreed():                  # once a step, on every rank
            checkpointer.save(...)
            sys.exit(EXIT_AGAIN)

Schedulers send SIGTERM or SIGUSR1 before they take the machine away; Ctrl-C does the same, and a second one stops at
once. The death of the launcher (it was killed, its terminal closed) counts as SIGHUP: its ranks would otherwise
continue beside those of the next start.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from trainer.core import distributed
from trainer.core.logs import EVERY_NODE

logger = logging.getLogger(__name__)


EXIT_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: stopped by a signal with everything saved; the same command resumes from there."""

NAMES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
ORDER = (0, *NAMES)
"""Of several signals, the last in this order is reported: a Ctrl-C comes with others."""


class StopSignals:
    """A context that catches these signals. Only for the main thread."""

    def __init__(self) -> None:
        self._caught = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for name in NAMES:
            if name == signal.SIGHUP and signal.getsignal(name) == signal.SIG_IGN:
                continue  # under nohup the run outlives the terminal
            self._before[name] = signal.signal(name, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self._caught != signal.SIGINT:  # launchers send SIGTERM after the terminal's Ctrl-C
            self._caught = number
        if number == signal.SIGINT:
            # The system's own handler works even while Python waits inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            logger.info("finishing this step and saving; Ctrl-C again stops at once", extra=EVERY_NODE)

    def agreed(self) -> str | None:
        """The name of the signal that any rank has caught, the same on every rank, or None. Every rank calls it after
        each step."""
        caught = self._caught or (signal.SIGHUP if distributed.orphaned() else 0)
        if distributed.world_size() > 1:
            votes = torch.tensor([ORDER.index(caught)], device=distributed.device())
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            caught = ORDER[int(votes.item())]
        return signal.Signals(caught).name if caught else None
