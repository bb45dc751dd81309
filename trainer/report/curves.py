"""``log.jsonl`` -> curves of a few hundred points, however long the run was."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

MOST_POINTS = 500


@dataclass
class MetricCurve:
    """y over x. Where the log had more points than can be seen, each is the mean of a stretch, and ``low`` and ``high``
    its extremes."""

    x: list[float]
    y: list[float | None]
    """None where no value of the stretch was finite."""
    low: list[float | None] | None = None
    high: list[float | None] | None = None

    @property
    def finite(self) -> list[float]:
        """All that has to fit into an image of it."""
        values = [*self.y, *(self.low or []), *(self.high or [])]
        return [value for value in values if value is not None]


@dataclass
class Log:
    """What a run wrote down: for each key ("eval.NAME" in evaluations, "vitals.NAME" in vitals) where and what, as raw
    columns."""

    columns: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    """The newest finite value of each key."""
    odd: dict[str, int] = field(default_factory=dict)
    """How often a key had no finite value."""
    advice: list[str] = field(default_factory=list)
    """What the run said is wrong (trainer/metrics/advice.py)."""
    damaged: int = 0
    """Lines that could not be read."""

    def curve(self, key: str, over: str = "samples_seen", most: int = MOST_POINTS) -> MetricCurve | None:
        """A curve over samples seen, or over "seconds" of training; None where the log has no such values."""
        if key not in self.columns or (over != "samples_seen" and over not in self.columns):
            return None
        x, y = self.columns[key]
        if over != "samples_seen":
            x = array("d", _interpolate(x, *self.columns[over]))
        return thin(x, y, most)

    def usual(self, key: str) -> float:
        """The median: the first steps, and pauses, are not the rule."""
        values = sorted(value for value in self.columns[key][1] if value == value)
        return values[len(values) // 2]


def read_log(path: Path) -> Log:
    """Reads line by line; a line that was cut short is counted and left out."""
    columns: dict[str, tuple[array[float], array[float]]] = defaultdict(lambda: (array("d"), array("d")))
    log = Log()
    if not path.is_file():
        return log
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                seen = float(record.pop("samples_seen"))
                for part in ("eval", "vitals"):
                    record |= {f"{part}.{name}": value for name, value in (record.pop(part, None) or {}).items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                log.damaged += 1
                continue
            log.advice += [str(record["advice"])] if "advice" in record else []
            for key, value in record.items():
                if isinstance(value, bool) or not isinstance(value, int | float | None):
                    continue
                number = math.nan if value is None else float(value)
                columns[key][0].append(seen)
                columns[key][1].append(number)
                if math.isfinite(number):
                    log.last[key] = number
                else:
                    log.odd[key] = log.odd.get(key, 0) + 1
            log.last["samples_seen"] = max(seen, log.last.get("samples_seen", 0.0))
    log.columns = {key: column for key, column in columns.items() if any(map(math.isfinite, column[1]))}
    return log


def thin(x: array[float], y: array[float], most: int) -> MetricCurve:
    """At most ``most`` points: equal stretches of the log, their mean, least and greatest. Nothing that peaked is
    lost."""
    if len(x) <= most:
        return MetricCurve(list(x), [value if math.isfinite(value) else None for value in y])
    curve = MetricCurve([], [], [], [])
    assert curve.low is not None and curve.high is not None
    for number in range(most):
        start, stop = number * len(x) // most, (number + 1) * len(x) // most
        values = [value for value in y[start:stop] if math.isfinite(value)]
        curve.x.append(sum(x[start:stop]) / (stop - start))
        curve.y.append(sum(values) / len(values) if values else None)
        curve.low.append(min(values) if values else None)
        curve.high.append(max(values) if values else None)
    return curve


def _interpolate(at: array[float], x: array[float], y: array[float]) -> list[float]:
    """y at the points ``at``, both ascending; ends are held."""
    found, place = [], 0
    for point in at:
        while place + 1 < len(x) and x[place + 1] <= point:
            place += 1
        if place + 1 < len(x) and x[place] <= point and x[place + 1] > x[place]:
            share = (point - x[place]) / (x[place + 1] - x[place])
            found.append(y[place] + share * (y[place + 1] - y[place]))
        else:
            found.append(y[place])
    return found
