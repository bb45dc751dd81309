"""Progress of long work: one line, redrawn in place on a terminal and printed every few seconds elsewhere.

with Progress(total=num_samples, unit="samples") as progress:
    for batch in batches:
        progress.add(len(batch))                      # 1,024/50,000 samples | 311 samples/s | ETA 0:02:37
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from data_tools.io.formatting import duration

REDRAW_SECONDS = 0.2


class StatusLine:
    """Shows the latest state on ``stream`` (stderr): redrawn every 0.2 s on a terminal, printed as a line every
    ``seconds`` elsewhere."""

    def __init__(self, seconds: float, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = REDRAW_SECONDS if self._terminal else seconds
        self._next = 0.0
        self._open = False

    def show(self, render: Callable[[int | None], str], last: bool = False) -> None:
        """Shows ``render(width)`` if it is due, or if it is the ``last``. ``width`` is the terminal's number of
        columns, None without a terminal."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + self._every
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{render(width)[:width]}")
            self._open = True
        else:
            self._stream.write(render(None) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line and leaves it on the terminal."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


class Progress:
    """Counts to ``total`` and shows the rate over the last half minute or so and the time left. ``done`` units were
    finished by an earlier run; ``rate_unit`` is the unit of the rate if it is not ``unit``."""

    def __init__(self, total: int, done: int = 0, unit: str = "rows", rate_unit: str = "", quiet: bool = False) -> None:
        self.total, self.done, self.seen = total, done, 0
        """``seen``: units finished by this run."""
        self.unit, self.rate_unit = unit, rate_unit or unit
        self.started = time.monotonic()
        self._status = None if quiet else StatusLine(seconds=5.0)
        self._recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=120)

    def add(self, units: int) -> None:
        """Counts ``units`` more."""
        self.seen += units
        now = time.monotonic()
        self._recent.append((now, self.seen))
        if self._status is not None and now - self.started >= REDRAW_SECONDS:
            self._status.show(lambda _: self.line(now))

    def line(self, now: float) -> str:
        """The progress line."""
        start, seen = self._recent[0]
        rate = (self.seen - seen) / max(now - start, 1e-3)
        left = f"ETA {duration(max(self.total - self.done - self.seen, 0) / rate)}" if rate > 0 else "ETA ?"
        return " | ".join([*self._facts(rate), left])

    def _facts(self, rate: float) -> list[str]:
        position = f"{self.done + self.seen:,}/{self.total:,} {self.unit}"
        return [position, f"{rate:,.0f} {self.rate_unit}/s", *self.details()]

    def details(self) -> list[str]:
        """Further fields of the line, between the rate and the time left."""
        return []

    def close(self) -> None:
        """Shows the last line: rate and duration of the whole run."""
        if self._status is not None:
            seconds = max(time.monotonic() - self.started, 1e-3)
            text = " | ".join([*self._facts(self.seen / seconds), duration(seconds)])
            self._status.show(lambda _: text, last=True)
            self._status.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
