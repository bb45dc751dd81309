"""Counts what happens to rows and reports it a few times a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_SECONDS = 0.2
_ROWS = 200


@dataclass
class Tally:
    """What has happened to rows since the last report."""

    images: int = 0
    bytes: int = 0
    """Bytes of images as read."""
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    """Rows that were left out, as in rejects.jsonl, each with the "path" that was not found, if any."""


class Reporter:
    """Accumulates a worker's counts."""

    def __init__(self, send: Callable[[Tally], None]) -> None:
        self._send = send
        self._tally, self._rows, self._sent = Tally(), 0, time.monotonic()

    def image(self, num_bytes: int) -> None:
        """Counts a written sample."""
        self._tally.images += 1
        self._tally.bytes += num_bytes
        self._tick()

    def reject(self, line: dict[str, str], path: str | None) -> None:
        """Counts a row that was left out: its line of rejects.jsonl, and the path that was not found."""
        self._tally.rejected[line["reason"]] += 1
        self._tally.examples.append({**line, "path": path} if path else line)
        self._tick()

    def _tick(self) -> None:
        self._rows += 1
        if self._rows >= _ROWS or time.monotonic() - self._sent > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends the counts since the last report."""
        self._send(self._tally)
        self._tally, self._rows, self._sent = Tally(), 0, time.monotonic()
