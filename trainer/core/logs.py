"""What a run tells its user: the standard library's logger ``trainer``, on one rank and to stderr.

    logging.getLogger("trainer").setLevel(logging.WARNING)      # from Python: warnings only
    logging.getLogger("trainer").propagate = True               # to the handlers of the root logger too

Modules log with ``logger = logging.getLogger(__name__)``. A message comes from rank 0, unless it is logged with
``extra=EVERY_NODE`` (one rank of each node) or ``extra=EVERY_RANK``.
"""

from __future__ import annotations

import logging
import os
import sys

EVERY_NODE = {"ranks": "every node"}
EVERY_RANK = {"ranks": "every rank"}


def _from_this_rank(record: logging.LogRecord) -> bool:
    match getattr(record, "ranks", None):
        case "every rank":
            return True
        case "every node":
            from trainer.core import distributed  # not above: `ringlip --help` does without torch

            return distributed.local_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class _Terminal(logging.Handler):
    """Writes to ``sys.stderr`` as it is now, over the progress line where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(clear + level + self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def to_the_terminal() -> None:
    """Has the package's messages printed; what the user has set on the logger stays. Safe to call again."""
    logger = logging.getLogger("trainer")
    if not logger.handlers:
        handler = _Terminal()
        handler.addFilter(_from_this_rank)
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
