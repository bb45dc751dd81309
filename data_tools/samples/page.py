"""The page that `stats` writes: one HTML file with its plots and images inside, light or dark as the reader has
it."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, NamedTuple

from PIL import Image

from data_tools.io.formatting import human_bytes
from data_tools.samples.decoding import decode
from data_tools.samples.reject import Reject

_THUMB = 160


class Picture(NamedTuple):
    """A sample on the contact sheet."""

    number: int
    image: bytes
    caption: str
    width: int
    height: int


_STYLE = """
:root { --ground: #fcfcfb; --card: #ffffff; --ink: #1d1d1b; --soft: #6b6b66; --line: #e4e3df;
  --bar: #2f6fb2; --bar2: #b9cfe6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #191918; --card: #222221; --ink: #ececea; --soft: #a3a29c; --line: #373735;
    --bar: #6ea6df; --bar2: #2f4a66; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 12px; }
p.lead { color: var(--soft); margin: 0 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; }
.tile, .plot { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 16px; }
.plot h3 { font-size: 14px; margin: 0; } .plot p { margin: 2px 0 8px; color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
rect.bar { fill: var(--bar); } rect.bar:hover { opacity: .75; } line.axis { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-size: 13px; } td { padding: 3px 0; vertical-align: middle; }
td.n { text-align: right; width: 90px; font-variant-numeric: tabular-nums; color: var(--soft); padding-left: 10px; }
td.meter { width: 45%; }
td.meter i { display: block; height: 9px; border-radius: 2px; background: var(--bar); min-width: 1px; }
.words span { display: inline-block; margin: 0 10px 2px 0; } .words small { color: var(--soft); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure div { height: 160px; display: flex; align-items: center; justify-content: center; background: var(--ground); }
figure img { max-width: 100%; max-height: 160px; min-width: 64px; image-rendering: auto; }
figcaption { padding: 8px 10px; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
figcaption small { display: block; color: var(--soft); margin-top: 4px; }
"""


def render(name: str, figures: dict[str, Any], pictures: list[Picture]) -> str:
    """The whole page."""
    captions = figures["captions"]
    everything = captions["looked_at"] == figures["samples"]
    looked = "all captions" if everything else f"a random {captions['looked_at']:,} captions"
    plots = [
        histogram("Width", "pixels", figures["width"]),
        histogram("Height", "pixels", figures["height"]),
        histogram("Aspect", "width / height", figures["aspect"]),
        histogram("Image size", "bytes", figures["image_bytes"]),
        histogram("Caption length", "characters", captions["characters"]),
        histogram("Caption length", "words", captions["words"]),
        *([histogram("Caption length", "tokens", captions["tokens"])] if "tokens" in captions else []),
    ]
    lists = [
        meters("Languages", "guessed from script and small words", captions["languages"]),
        meters("Formats", "as stored", figures["formats"]),
        meters("Left out", "rows of the input that could not be used", figures["rejected"]),
        meters("Repeated captions", "the commonest", dict(captions["repeated"][:12])),
    ]
    words = " ".join(
        f"<span>{escape(word)} <small>{count:,}</small></span>" for word, count in captions["common_words"]
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: what is in it</title><style>{_STYLE}</style></head><body><main>
<h1>{escape(name)}</h1><p class="lead">Sizes are those of all samples; caption figures are those of {looked}.</p>
<div class="tiles">{"".join(tiles(figures))}</div>
<h2>Images and captions</h2><div class="plots">{"".join(plots)}</div>
<h2>What they are</h2><div class="plots">{"".join(lists)}</div>
<h2>Common words</h2><p class="words">{words}</p>
<h2>Contact sheet</h2><div class="sheet">{"".join(figure(picture) for picture in pictures)}</div>
</main></body></html>
"""


def tiles(figures: dict[str, Any]) -> list[str]:
    """The figures at the top."""
    captions, twice = figures["captions"], figures["duplicate_pictures"]
    shown = [
        ("samples", f"{figures['samples']:,}"),
        ("shards", f"{figures['shards']:,}"),
        ("in tars", human_bytes(figures["bytes"])),
        ("rows left out", f"{sum(figures['rejected'].values()):,}"),
        ("images there twice (same bytes)", f"{twice['extra']:,}"),
        ("captions there twice", f"{captions['repeated_extra']:,}"),
        ("different words", f"{captions['vocabulary']:,}"),
        ("captions an image, at most", f"{figures['max_captions']:,}"),
    ]
    return [f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in shown]


def histogram(title: str, unit: str, numbers: dict[str, Any]) -> str:
    """A histogram as inline SVG, with the median and the middle 90% in words."""
    if not numbers["count"]:
        return f'<div class="plot"><h3>{title}</h3><p>unknown</p></div>'
    if numbers["quantiles"]["0"] == numbers["quantiles"]["1"]:
        return f'<div class="plot"><h3>{title}</h3><p>{unit}; every sample has {short(numbers["mean"])}</p></div>'
    edges, counts, quantiles = numbers["edges"], numbers["counts"], numbers["quantiles"]
    wide, high, top = 360.0, 150.0, max(counts)
    step = wide / len(counts)
    bars = []
    for place, count in enumerate(counts):
        tall = high * count / top if top else 0
        label = f"{short(edges[place])} to {short(edges[place + 1])}: {count:,}"
        box = f'x="{place * step:.1f}" y="{high - tall + 8:.1f}" width="{max(step - 1, 1):.1f}" height="{tall:.1f}"'
        bars.append(f'<rect class="bar" {box}><title>{label}</title></rect>')
    ticks = []
    for place in sorted({0, len(counts) // 2, len(counts)}):
        anchor = "start" if place == 0 else "end" if place == len(counts) else "middle"
        ticks.append(
            f'<text x="{place * step:.1f}" y="{high + 24:.0f}" text-anchor="{anchor}">{short(edges[place])}</text>'
        )
    about = (
        f"{unit}; median {short(quantiles['0.5'])}, 90% between {short(quantiles['0.05'])} and "
        f"{short(quantiles['0.95'])}"
    )
    axis = f'<line class="axis" x1="0" x2="{wide:.0f}" y1="{high + 8.5}" y2="{high + 8.5}"/>'
    svg = (
        f'<svg viewBox="0 0 {wide:.0f} {high + 30:.0f}" role="img" '
        f'aria-label="{title}">{axis}{"".join(bars)}{"".join(ticks)}</svg>'
    )
    return f'<div class="plot"><h3>{title}</h3><p>{about}</p>{svg}</div>'


def meters(title: str, about: str, counts: dict[str, int]) -> str:
    """A small table of counts with bars."""
    top = max(counts.values(), default=1)
    if not counts:
        return ""
    rows = []
    for name, count in list(counts.items())[:14]:
        bar = f'<td class="meter"><i style="width:{100 * count / top:.1f}%"></i></td>'
        rows.append(f'<tr><td>{escape(name[:80])}</td>{bar}<td class="n">{count:,}</td></tr>')
    return f'<div class="plot"><h3>{title}</h3><p>{about}</p><table>{"".join(rows)}</table></div>'


def figure(picture: Picture) -> str:
    """An image with its caption."""
    caption = picture.caption if len(picture.caption) <= 160 else picture.caption[:157] + "..."
    about = f"<small>{picture.number} &middot; {picture.width} &times; {picture.height}</small>"
    try:
        source = thumbnail(picture.image)
    except Reject as reject:
        return f"<figure><div>{reject.reason}</div><figcaption>{escape(caption)}{about}</figcaption></figure>"
    return (
        f'<figure><div><img alt="" src="{source}"></div><figcaption '
        f'dir="auto">{escape(caption)}{about}</figcaption></figure>'
    )


def thumbnail(image: bytes) -> str:
    """An image of at most 160 pixels a side as a data: URL. Raises Reject when it is damaged."""
    small = Image.fromarray(decode(image, least=(2 * _THUMB, 2 * _THUMB)))
    small.thumbnail((_THUMB * 2, _THUMB * 2))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def short(value: float) -> str:
    """A number for an axis."""
    if value >= 10_000:
        return f"{value / 1000:,.0f}k" if value < 1e6 else f"{value / 1e6:,.1f}M"
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"
