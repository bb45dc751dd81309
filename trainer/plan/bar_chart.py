"""The table as stacked bars: one SVG, no dependencies, readable inside the report's HTML."""

from __future__ import annotations

from html import escape

from trainer.plan.memory import PARTS

COLOURS = dict(
    zip(PARTS, ("#4c78a8", "#9ecae9", "#f58518", "#54a24b", "#e45756", "#b279a2", "#bab0ac", "#eeca3b"), strict=True)
)
LEFT, WIDTH, ROW, TOP = 330, 620, 24, 64


def bars(rows: list[tuple[str, dict[str, float], str]], limit: float, title: str) -> str:
    """An SVG of one stacked bar a row (label, bytes by part, note), with a line at ``limit`` bytes where any bar comes
    near it."""
    longest = max(sum(parts.values()) for _, parts, _ in rows)
    near = longest > limit / 4
    # What does not fit by far is cut off, its number stands beside it; small models would be slivers beside the limit.
    largest = min(max(limit * 1.15, longest), 3 * limit) if near else longest * 1.15
    height = TOP + ROW * len(rows) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 250} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-size="15">{escape(title)}</text>',
    ]
    for number, (part, colour) in enumerate(COLOURS.items()):
        column = 10 + number * 130
        out.append(
            f'<rect x="{column}" y="32" width="12" height="12" fill="{colour}"/><text x="{column + 17}" '
            f'y="42">{part}</text>'
        )
    mark = LEFT + (limit / largest * WIDTH if near else 0)
    for number, (label, parts, note) in enumerate(rows):
        y, x, total = TOP + number * ROW, float(LEFT), sum(parts.values())
        faint = "" if total <= limit else ' opacity="0.35"'
        out.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end"{faint}>{escape(label)}</text>')
        for part, colour in COLOURS.items():
            wide = min(parts.get(part, 0.0) / largest * WIDTH, LEFT + WIDTH - x)
            if wide > 0:
                out.append(
                    f'<rect x="{x:.1f}" y="{y + 2}" width="{wide:.1f}" height="{ROW - 6}" fill="{colour}"{faint}/>'
                )
                x += wide
        out.append(f'<text x="{max(x, mark) + 8:.1f}" y="{y + 15}"{faint}>{escape(note)}</text>')
    bottom = TOP + ROW * len(rows)
    room = f"{limit / 2**30:.1f} GiB to use"
    if near:
        out.append(
            f'<line x1="{mark:.1f}" y1="{TOP - 8}" x2="{mark:.1f}" y2="{bottom + 4}" stroke="#c00" '
            f'stroke-dasharray="4 3"/>'
        )
        out.append(f'<text x="{mark:.1f}" y="{bottom + 20}" text-anchor="middle" fill="#c00">{room}</text>')
    else:
        out.append(
            f'<text x="{LEFT}" y="{bottom + 20}" fill="#c00">{room}, {limit / longest:.0f} times the longest bar</text>'
        )
    out.append("</svg>")
    return "\n".join(out) + "\n"
