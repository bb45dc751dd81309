"""Messages of a run: the standard library's logger ``trainer``, printed to stderr on one rank.

    logging.getLogger("trainer").setLevel(logging.WARNING)      # from Python: warnings only
    logging.getLogger("trainer").propagate = True               # to the handlers of the root logger too

Modules log with ``logger = logging.getLogger(__name__)``. A message comes from rank 0, unless it is logged with
``extra=EVERY_NODE`` (one rank of each node) or ``extra=EVERY_RANK``.
"""

from __future__ import annotations

import logging
import os
import sys

from data_tools.io.formatting import printable

EVERY_NODE = {"ranks": "every node"}
EVERY_RANK = {"ranks": "every rank"}


def _from_this_rank(record: logging.LogRecord) -> bool:
    match getattr(record, "ranks", None):
        case "every rank":
            return True
        case "every node":
            from trainer.core import distributed  # here, because `ringlip --help` need not import torch

            return distributed.local_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class _Terminal(logging.Handler):
    """Prints to the current ``sys.stderr``, over a progress line if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(clear + printable(level + self.format(record)), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def to_the_terminal() -> None:
    """Prints the package's messages, unless the user has configured the logger already. Safe to call again."""
    logger = logging.getLogger("trainer")
    if not logger.handlers:
        handler = _Terminal()
        handler.addFilter(_from_this_rank)
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
