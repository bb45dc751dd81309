"""One line that a person likes to watch: rewritten in place on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

REFRESH_SECONDS = 0.2
STRAGGLES = 1.5
"""A rank that takes this many times the median's time is named."""


class ProgressLine:
    """Shows the newest values of a run; only rank 0 makes one."""

    def __init__(self, total_samples: int, seconds: float, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total = total_samples
        self._live = self._stream.isatty()
        self._every = REFRESH_SECONDS if self._live else seconds
        self._next = 0.0
        self._open = False

    def show(self, values: dict[str, Any], last: bool = False) -> None:
        """``values`` as in ``log.jsonl``; shown when it is time, or when it is the last."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + self._every
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{render(values, self._total, width)}")
            self._open = True
        else:
            self._stream.write(render(values, self._total) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last one standing."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


def render(values: dict[str, Any], total_samples: int, width: int | None = None) -> str:
    """The line: position, what is learnt, how fast, how much longer. What matters less is left out where ``width`` is
    short."""
    parts = _parts(values, total_samples)
    for unimportant in ("bias", "scale", "grad", "data", "samples", "lr", "memory"):
        if width is None or len(" · ".join(parts.values())) <= width:
            break
        parts.pop(unimportant, None)
    return " · ".join(parts.values())[:width]


def _parts(values: dict[str, Any], total_samples: int) -> dict[str, str]:
    seen, step, rate = values["samples_seen"], values["step"], values.get("pairs_per_second") or 0.0
    steps = max(step, round(step * total_samples / seen)) if seen else 0
    parts = {"step": f"step {step:,}/{steps:,} {min(seen / total_samples, 1):.0%}", "samples": f"{count(seen)} pairs"}
    for key, name, form in (
        ("loss", "loss", "loss {:.4f}"),
        ("lr", "lr", "lr {:.2e}"),
        ("grad_norm", "grad", "grad {:.3g}"),
        ("scale", "scale", "t {:.2f}"),
        ("bias", "bias", "b {:.2f}"),
    ):
        if values.get(key) is not None:
            parts[name] = form.format(values[key])
    if rate:
        parts["rate"] = f"{count(rate)} pairs/s"
    if "memory_bytes" in values:
        parts["memory"] = f"{values['memory_bytes'] / 1e9:.1f} GB"
    if "data_wait" in values:
        parts["data"] = f"data {values['data_wait']:.0%}"
    spread = values.get("rank_seconds")
    if spread and spread["most"] > STRAGGLES * spread["median"]:
        parts["slow"] = f"waits for rank {values['slowest_rank']} (+{spread['most'] - spread['median']:.2f} s)"
    if rate:
        parts["eta"] = f"ETA {duration(max(total_samples - seen, 0) / rate)}"
    return parts


def count(number: float) -> str:
    """1234 -> 1,234; 1234567 -> 1.23M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if number >= limit:
            scaled = number / (1e3 if unit == "k" else limit)
            return f"{scaled:.2f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def duration(seconds: float) -> str:
    """3725 -> 1:02:05; days in front where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"
