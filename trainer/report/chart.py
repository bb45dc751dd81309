"""A line chart as inline SVG. Lines stretch with the page, letters do not: ticks are HTML beside an image without an
aspect of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trainer.report.curves import MetricCurve

COLOURS = ("a", "b", "c", "d", "e", "f", "g", "h")
HEIGHT, WIDTH = 100, 1000


@dataclass(frozen=True)
class Axis:
    """From values to [0, 1], with ticks."""

    low: float
    high: float
    log: bool
    ticks: list[float]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return (value - low) / (high - low)


def linear_axis(values: Sequence[float], ticks: int = 5, low: float | None = None, high: float | None = None) -> Axis:
    """Round numbers around all values."""
    least, most = min(values) if low is None else low, max(values) if high is None else high
    if most - least <= 1e-12 * max(abs(most), abs(least)):
        margin = abs(most) * 0.1 or 1.0
        least, most = (least if low is not None else least - margin), (most if high is not None else most + margin)
    step = 10 ** math.floor(math.log10((most - least) / ticks))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (most - least) / (step * factor) <= ticks)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return Axis(first * step, last * step, False, [number * step for number in range(first, last + 1)])


def log_axis(values: Sequence[float]) -> Axis:
    """1, 2 and 5 times powers of ten, or powers alone, around all values; they must be positive."""
    least, most = min(values), max(values)
    steps = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 1)
        for factor in (1, 2, 5)
    ]
    low = max((step for step in steps if step <= least * 1.0001), default=steps[0])
    high = min((step for step in steps if step >= most * 0.9999), default=steps[-1])
    if low == high:
        high = steps[steps.index(low) + 1] if low != steps[-1] else low * 10
    ticks = [step for step in steps if low <= step <= high]
    if len(ticks) > 7:
        powers = [tick for tick in ticks if math.isclose(math.log10(tick), round(math.log10(tick)), abs_tol=1e-6)]
        ticks = powers[:: -(-len(powers) // 7)]
    return Axis(low, high, True, ticks)


def line_chart(
    title: str,
    curves: dict[str, MetricCurve | None],
    x: str,
    *,
    unit: str = "",
    x_unit: str = "",
    scale: float = 1.0,
    x_scale: float = 1.0,
    log: bool = False,
    zero: bool = False,
    top: float | None = None,
    about: str = "",
    wide: bool = False,
) -> str:
    """HTML of a chart, or nothing where no curve has a point. Values are multiplied by ``scale`` before they are shown
    in ``unit``.

    ``log`` asks for a logarithmic axis, which is used where values differ by more than a factor of 5 and are positive;
    ``zero`` puts zero on the axis, ``top`` its highest value.
    """
    shown = {name: curve for name, curve in curves.items() if curve is not None and curve.finite}
    if not shown:
        return ""
    values = [scale * value for curve in shown.values() for value in curve.finite]
    log = log and min(values) > 0 and max(values) > 5 * min(values)
    y_axis = log_axis(values) if log else linear_axis(values, low=min(0.0, *values) if zero else None, high=top)
    places = [x_scale * at for curve in shown.values() for at in curve.x]
    least, most = min(places), max(places)
    least = 0.0 if 0 < least < 0.2 * most else least
    x_axis = Axis(least, most if most > least else least + 1, False, [])
    series, paths, key = [], [], []
    for number, name in enumerate(curves):  # a run has the same colour in every chart
        curve = shown.get(name)
        if curve is None:
            continue
        colour = COLOURS[number % len(COLOURS)]
        drawn = _series(name, colour, curve, x_axis, y_axis, scale, x_scale)
        series.append(drawn)
        paths.append(_paths(drawn, y_axis, scale, curve))
        key.append(
            f'<span class="key" style="--s:var(--{colour})"><i></i>{escape(name)}</span>' if len(shown) > 1 else ""
        )
    grid = "".join(
        f'<line class="grid" x1="0" x2="{WIDTH}" y1="{_y(y_axis, tick)}" y2="{_y(y_axis, tick)}"/>'
        for tick in y_axis.ticks
    )
    notes = " · ".join(part for part in (about, "log scale" if log else "") if part)
    data = {"x": x, "x_unit": x_unit, "unit": unit, "series": series}
    head = f"<h3>{escape(title)}{''.join(key)}<small>{escape(notes)}</small></h3>"
    return (
        f'<figure class="chart{" wide" if wide else ""}">{head}'
        f'<div class="frame"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">'
        f"{grid}{''.join(paths)}</svg>{_ticks(y_axis, unit)}{_x_ticks(x_axis, x, x_unit)}"
        f"{json_script(data)}</div></figure>"
    )


def json_script(data: Any) -> str:
    """Data for the page's script; no string in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        '<script type="application/json">'
        + text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        + "</script>"
    )


def short(value: float) -> str:
    """A tick's label: 12.5k, 1.2M, 0.001, 1e-5."""
    size = abs(value)
    for limit, sign in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if sign == 'k' else limit):.4g}{sign}"
    if size and size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}"


def _series(
    name: str, colour: str, curve: MetricCurve, x_axis: Axis, y_axis: Axis, scale: float, x_scale: float
) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else float(f"{scale * value:.6g}")

    found: dict[str, Any] = {
        "name": name,
        "colour": colour,
        "at": [round(x_axis.place(x_scale * at), 4) for at in curve.x],
        "height": [None if value is None else round(y_axis.place(scale * value), 4) for value in curve.y],
        "x": [float(f"{x_scale * at:.9g}") for at in curve.x],
        "y": [rounded(value) for value in curve.y],
    }
    if curve.low is not None and curve.high is not None:
        found |= {"low": [rounded(value) for value in curve.low], "high": [rounded(value) for value in curve.high]}
    return found


def _paths(drawn: dict[str, Any], y_axis: Axis, scale: float, curve: MetricCurve) -> str:
    style = f'style="--s:var(--{drawn["colour"]})"'
    band = ""
    if curve.low is not None and curve.high is not None:
        edges = [
            (at, low, high)
            for at, low, high in zip(drawn["at"], curve.low, curve.high, strict=True)
            if low is not None and high is not None
        ]
        upper = [f"{WIDTH * at:.1f} {_y(y_axis, scale * high)}" for at, _, high in edges]
        lower = [f"{WIDTH * at:.1f} {_y(y_axis, scale * low)}" for at, low, _ in reversed(edges)]
        band = f'<path class="band" {style} d="M{"L".join(upper + lower)}Z"/>'
    steps, pen = [], "M"
    for at, height in zip(drawn["at"], drawn["height"], strict=True):
        if height is None:
            pen = "M"
            continue
        steps.append(f"{pen}{WIDTH * at:.1f} {HEIGHT * (1 - height):.2f}")
        pen = "L"
    if len(steps) == 1:
        steps.append("h0.1")
    return f'{band}<path class="line" {style} d="{"".join(steps)}"/>'


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - axis.place(value)):.2f}"


def _ticks(axis: Axis, unit: str) -> str:
    return "".join(
        f'<span class="y" style="top:{100 * (1 - axis.place(tick)):.2f}%">{short(round(tick, 12))}{escape(unit)}</span>'
        for tick in axis.ticks
    )


def _x_ticks(axis: Axis, name: str, unit: str) -> str:
    inner = [tick for tick in linear_axis([axis.low, axis.high], 4).ticks if axis.low < tick < axis.high]
    middle = [tick for tick in inner if 0.12 < axis.place(tick) < 0.68]
    labels = [(axis.low, "x first", short(axis.low)), *((tick, "x", short(tick)) for tick in middle)]
    labels.append((axis.high, "x last", f"{short(float(f'{axis.high:.3g}'))}{unit} {name}"))
    return "".join(
        f'<span class="{kind}" style="left:{100 * axis.place(tick):.2f}%">{escape(text)}</span>'
        for tick, kind, text in labels
    )
