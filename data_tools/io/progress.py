"""A line that says how fast it goes, what is left out and when it ends; redrawn on a terminal, every few seconds in a
log."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter, deque

from data_tools.sharding.counts import Tally

EXAMPLES = 1000


class Progress:
    """Counts rows of all workers and prints to stderr."""

    def __init__(self, total: int, done: int, quiet: bool = False) -> None:
        self.total, self.done, self.images, self.bytes = total, done, 0, 0
        self.rejected: Counter[str] = Counter()
        self.examples: list[dict[str, str]] = []
        """The first ones that were left out."""
        self.started = time.monotonic()
        self._quiet, self._tty = quiet, sys.stderr.isatty()
        self._recent: deque[tuple[float, int, int]] = deque([(self.started, 0, 0)], maxlen=120)
        self._printed = self.started

    @property
    def seen(self) -> int:
        """Rows looked at by this run."""
        return self.images + sum(self.rejected.values())

    def add(self, tally: Tally) -> None:
        """Adds a worker's report and prints when it is time to."""
        self.images += tally.images
        self.bytes += tally.bytes
        self.rejected += tally.rejected
        self.examples += tally.examples[: EXAMPLES - len(self.examples)]
        now = time.monotonic()
        self._recent.append((now, self.seen, self.bytes))
        if not self._quiet and now - self._printed > (0.2 if self._tty else 5.0):
            self._printed = now
            self._print(self.line(now), "\r" if self._tty else "\n")

    def line(self, now: float) -> str:
        """The rates are those of the last half minute or so."""
        start, rows, size = self._recent[0]
        seconds = max(now - start, 1e-3)
        rate = (self.seen - rows) / seconds
        left = self.total - self.done - self.seen
        eta = _clock(left / rate) if rate > 0 else "?"
        parts = [
            f"{self.done + self.seen:,}/{self.total:,} rows",
            f"{rate:,.0f} images/s",
            f"{(self.bytes - size) / seconds / 1e6:,.1f} MB/s",
        ]
        if self.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.most_common(4))
            parts.append(f"left out {sum(self.rejected.values()):,} ({reasons})")
        return " | ".join([*parts, f"ETA {eta}"])

    def close(self) -> None:
        """The last line, with the rates of the whole run."""
        if self._quiet:
            return
        self._recent = deque([(self.started, 0, 0)])
        now = time.monotonic()
        self._print(self.line(now).rpartition(" | ")[0] + f" | {_clock(now - self.started)}", "\n")

    def _print(self, text: str, end: str) -> None:
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            text = text[:width].ljust(width)
        print(text, end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}" if minutes else f"{seconds:.1f} s"
