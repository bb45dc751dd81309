"""What a study found, as a picture (SVG, alone or in the page) and as one HTML page."""

from __future__ import annotations

from html import escape
from typing import Any

from trainer.report.chart import COLOURS, linear_axis, short
from trainer.report.page import whole_page
from trainer.study.settings import StudySettings
from trainer.study.verdict import OPPOSITE, SAME, Cell, Result

PALETTE = dict(
    zip(COLOURS, ("#2563b0", "#d26a1b", "#2f8a5b", "#8a4fb5", "#b3345c", "#0f8f9b", "#8a6d1d", "#5c6470"), strict=True)
)
"""The report's colours, for a picture outside its page."""
LEFT, WIDTH, TOP, HEIGHT = 60, 620, 40, 260
Summaries = dict[Cell, Result]


def picture(title: str, study: StudySettings, cells: Summaries) -> str:
    """An SVG: a curve a contestant over the columns of the grid, with bars of one standard error. A grid of one column
    is a point a contestant."""
    labels = list(study.grid)
    single = len(labels) == 1
    shown = list(study.contestants) if single else labels
    ends = [r.value + sign * (r.error or 0.0) for r in cells.values() for sign in (-1, 1)]
    axis = linear_axis(ends, low=0.0 if min(ends) >= 0 else None)
    rows = -(-len(study.contestants) // 3)
    top = TOP + 18 * rows
    height = top + HEIGHT + 46

    def x(place: int, number: int) -> float:
        shift = 0 if single else 3 * (number - (len(study.contestants) - 1) / 2)  # bars must not hide one another
        return LEFT + WIDTH * (place + 0.5) / len(shown) + shift

    def y(value: float) -> float:
        return top + HEIGHT * (1 - axis.place(value))

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" role="img" '
        'style="max-width:860px;width:100%" font-family="sans-serif" font-size="12" fill="currentColor">'
        f'<text x="{LEFT}" y="18" font-size="15">{escape(title)}</text>'
    ]
    out += [
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#8884"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(round(tick, 12))}</text>'
        for tick in axis.ticks
    ]
    for place, label in enumerate(shown):
        at = LEFT + WIDTH * (place + 0.5) / len(shown)
        out.append(f'<text x="{at:.1f}" y="{top + HEIGHT + 18}" text-anchor="middle">{escape(label)}</text>')
    out.append(f'<text x="{LEFT + WIDTH / 2}" y="{height - 8}" text-anchor="middle">{escape(study.x)}</text>')
    for number, name in enumerate(study.contestants):
        letter = COLOURS[number % len(COLOURS)]
        colour = f"var(--{letter},{PALETTE[letter]})"
        points = [
            (x(number if single else place, number), cells[name, label])
            for place, label in enumerate(labels)
            if (name, label) in cells
        ]
        line = " ".join(f"{at:.1f},{y(result.value):.1f}" for at, result in points)
        out.append(
            f'<g style="stroke:{colour};fill:{colour}"><polyline points="{line}" style="fill:none" stroke-width="2"/>'
        )
        for at, (value, error) in points:
            low, high = y(value - (error or 0.0)), y(value + (error or 0.0))
            out.append(
                f'<circle cx="{at:.1f}" cy="{y(value):.1f}" r="3"/><line x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" '
                f'y2="{high:.1f}" stroke-width="1.5"/>'
            )
        key = LEFT + (number % 3) * WIDTH / 3, TOP - 4 + 18 * (number // 3)
        out.append(
            f'<circle cx="{key[0] + 4:.1f}" cy="{key[1] - 4}" r="4"/></g>'
            f'<text x="{key[0] + 14:.1f}" y="{key[1]}">{escape(name)}</text>'
        )
    return "".join([*out, "</svg>\n"])


def page(name: str, study: StudySettings, found: dict[str, Any], cells: dict[str, Summaries], command: str) -> str:
    """The page: the paper's finding, ours, the same sign or not, and why."""
    claims = "".join(
        f"<tr><td>{escape(one['claim'])}</td><td>{number(one['value'], one['error'])}</td>"
        f'<td class="{ {SAME: "up", OPPOSITE: "down"}.get(one["verdict"], "") }">{one["verdict"]}</td></tr>'
        for one in found["claims"]
    )
    advice = "".join(f'<p class="note">{escape(text)}</p>' for text in found["advice"])
    parts = [
        f'<header><div><h1>{escape(study.title)}</h1><p class="lead">{escape(name)} · {escape(study.paper)}</p></div>'
        '<button id="theme" title="light or dark">light / dark</button></header>',
        f'<div class="tiles"><div class="tile main"><span>the paper\'s finding, here</span><b>{found["verdict"]}</b>'
        f"<span>{found['runs']['finished']} of {found['runs']['all']} runs</span></div></div>",
        f"<h2>The paper</h2><p>{escape(study.found)}</p><h2>Ours</h2>",
        '<p>Mean and standard error over seeds; "undecided" is within what seeds alone explain (Student\'s t, 95%, '
        "one-sided). One seed has no error.</p>",
        f'<div class="table wide"><table><tr><th>claim</th><th>left side</th><th></th></tr>{claims}</table></div>',
        *(picture(metric, study, shown) + _table(study, shown) for metric, shown in cells.items() if shown),
        f"<h2>Why</h2><p>{escape(study.why or 'Not explained yet.')}</p>",
        f"<h2>What the runs said of themselves</h2>{advice}" if advice else "",
        f"<h2>Again</h2><pre>{escape(command)}</pre>",
    ]
    return whole_page(study.title, "".join(parts))


def number(value: float | None, error: float | None) -> str:
    """0.4512 ± 0.0130, of as many digits as it takes."""
    if value is None:
        return ""
    return f"{value:.4g}" + (f" <small>± {error:.2g}</small>" if error is not None else "")


def _table(study: StudySettings, cells: Summaries) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in study.grid)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{number(*cells.get((name, label), (None, None)))}</td>" for label in study.grid)
        + "</tr>"
        for name in study.contestants
    )
    return f'<div class="table"><table><tr><th>{escape(study.x)}</th>{head}</tr>{rows}</table></div>'
