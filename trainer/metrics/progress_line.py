"""The progress line of a run: its latest values, without the least important ones on a narrow terminal."""

from __future__ import annotations

from typing import Any, TextIO

from data_tools.io.formatting import count, duration
from data_tools.io.progress import StatusLine

STRAGGLES = 1.5
"""A rank that takes more than this many times the median time is named."""


class ProgressLine:
    """Shows the latest values of a run; only rank 0 creates one."""

    def __init__(self, total_samples: int, seconds: float, stream: TextIO | None = None) -> None:
        self._total = total_samples
        self._status = StatusLine(seconds, stream)

    def show(self, values: dict[str, Any], last: bool = False) -> None:
        """Shows ``values`` (as in ``log.jsonl``) if it is due, or the last."""
        self._status.show(lambda width: render(values, self._total, width), last)

    def close(self) -> None:
        """Ends the line and leaves it on the terminal."""
        self._status.close()


def render(values: dict[str, Any], total_samples: int, width: int | None = None) -> str:
    """The line: samples seen, loss, speed, time left. The least important values are dropped if ``width`` is small."""
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
