"""The page: what was reached, how it got there, images, and all that is needed to do it again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

import trainer
from data_tools.io.formatting import count, duration
from trainer.report.curves import Log
from trainer.report.gallery import gallery_html
from trainer.report.provenance import plan_html, provenance_html
from trainer.report.run_charts import headlines, run_charts, words


@dataclass(frozen=True)
class Facts:
    """What lies in a run's directory; empty where a part is missing."""

    name: str
    log: Log
    evaluation: dict[str, Any]
    gallery: dict[str, Any]
    environment: dict[str, Any]
    recipe: str
    deepspeed: str
    plan: str
    """The SVG that ``python -m trainer.plan ... --out RUN/plan.svg`` draws."""
    directory: str

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as a mapping; empty where it cannot be read (the page shows its text all the same)."""
        try:
            found = yaml.safe_load(self.recipe) if self.recipe else {}
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}


def render(facts: Facts) -> str:
    """The whole page as one string."""
    body = "".join(
        [
            _header(facts),
            _tiles(facts),
            _missing(facts),
            _results(facts),
            run_charts({facts.name: facts.log}, bool((facts.settings.get("optim") or {}).get("ema"))),
            plan_html(facts.plan),
            gallery_html(facts.gallery),
            provenance_html(facts.evaluation, facts.environment, facts.recipe, facts.deepspeed),
        ]
    )
    return whole_page(facts.name, body)


def whole_page(title: str, body: str) -> str:
    """One HTML file around ``body``, with its style and script inside."""
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}"
        f"<footer>Made by RingLIP {trainer.__version__}, {made}. This page is one file and asks for nothing "
        f"else.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def _header(facts: Facts) -> str:
    return (
        f'<header><div><h1>{escape(facts.name)}</h1><p class="lead">{escape(_lead(facts))}</p></div>'
        '<button id="theme" title="light or dark">light / dark</button></header>'
    )


def _lead(facts: Facts) -> str:
    recipe = facts.settings
    parts = []
    model = recipe.get("model") or {}
    config = model.get("config") or {}
    if config.get("model_type"):
        parts.append(f"{config['model_type']} from a config")
    elif model.get("path"):
        parts.append(str(model["path"]))
    if facts.log.last.get("samples_seen"):
        parts.append(f"{count(facts.log.last['samples_seen'])} pairs seen")
    size = (recipe.get("batch") or {}).get("size")
    if size:
        parts.append(f"global batch {size:,}")
    start = (facts.environment.get("starts") or [{}])[-1]
    if start.get("ranks"):
        devices = sorted(set(start.get("devices") or [])) or ["CPU"]
        parts.append(f"{start['ranks']} rank{'s' if start['ranks'] > 1 else ''} on {', '.join(devices)}")
    ds_config = (recipe.get("engine") or {}).get("ds_config", "auto")
    if ds_config != "auto":
        parts.append(str(ds_config))
    return " · ".join(parts)


def _tiles(facts: Facts) -> str:
    tiles = [_metric_tile(facts.evaluation, name) for name in headlines(facts.evaluation.get("metrics") or {})]
    last = facts.log.last
    if "loss" in last:
        tiles.append(_tile("last loss", f"{last['loss']:.4g}"))
    if "pairs_per_second" in last:
        tiles.append(_tile("pairs per second", f"{facts.log.usual('pairs_per_second'):,.0f}"))
    if "memory_bytes" in last:
        tiles.append(_tile("memory per rank", f"{last['memory_bytes'] / 2**30:.1f} <small>GiB</small>"))
    if "seconds" in last:
        tiles.append(_tile("training time", duration(last["seconds"])))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _metric_tile(evaluation: dict[str, Any], name: str) -> str:
    value, error = evaluation["metrics"][name], (evaluation.get("standard_errors") or {}).get(name)
    ceiling = (evaluation.get("ceilings") or {}).get(name, 1.0)
    notes = [f"± {100 * error:.1f}"] if error else []
    notes += [f"at most {100 * ceiling:.1f}%"] if ceiling < 1 else []
    return _tile(words(name), f"{100 * value:.1f}<small>%</small>", " · ".join(notes), main=True)


def _tile(title: str, value: str, note: str = "", main: bool = False) -> str:
    return (
        f'<div class="tile{" main" if main else ""}"><span>{escape(title)}</span>'
        f"<b>{value}</b><span>{escape(note)}</span></div>"
    )


def _missing(facts: Facts) -> str:
    notes = []
    if not facts.evaluation:
        command = f"python -m trainer.evaluate {facts.directory} --out {facts.directory}/evaluation.json"
        notes.append(f"Not evaluated yet: <code>{escape(command)}</code>, then make this page again.")
    if facts.log.last and not facts.log.columns.get("loss"):
        notes.append("The log holds no loss yet.")
    if not facts.log.last:
        notes.append("There is no log.jsonl here: no curves.")
    if facts.log.odd.get("loss"):
        notes.append(f"The loss was not finite at {facts.log.odd['loss']:,} logged steps; the curve has gaps there.")
    if facts.log.damaged:
        notes.append(f"{facts.log.damaged:,} lines of log.jsonl could not be read and were left out.")
    notes += [escape(f"Advice: {text}") for text in dict.fromkeys(facts.log.advice)]
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _results(facts: Facts) -> str:
    evaluation = facts.evaluation
    if not evaluation:
        return ""
    base = evaluation.get("base_metrics") or {}
    ceilings, errors = evaluation.get("ceilings") or {}, evaluation.get("standard_errors") or {}
    head = ["", *(["base", "change"] if base else []), "score", "±", "at most"]
    rows = []
    for name, value in evaluation["metrics"].items():
        change = value - base.get(name, value)
        cells = [escape(words(name))]
        if base:
            cells += [percent(base.get(name)), f"{100 * change:+.1f}"]
        cells += [
            f"<b>{percent(value)}</b>",
            f"{100 * errors[name]:.1f}" if name in errors else "",
            percent(ceilings.get(name)),
        ]
        kinds = ["", *(["", "up" if change > 0 else "down" if change < 0 else ""] if base else []), "", "", ""]
        rows.append(
            "<tr>"
            + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, cells, strict=True))
            + "</tr>"
        )
    sizes = "; ".join(_size(path, size) for path, size in evaluation["datasets"].items())
    against = f" The base is {escape(str(evaluation['against']))}." if base else ""
    note = (
        "± is the standard error; at most, what a perfect model would reach, since nothing can tell apart what is "
        "the same to the last pixel or letter. Ties count as the chance to win them."
    )
    table = (
        f"<div "
        f'class="table"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{"".join(rows)}</table></div>'
    )
    return f"<h2>Results</h2><p>{escape(sizes)}.{against} {note}</p>{table}{_classes(evaluation)}"


def _size(path: str, size: dict[str, int]) -> str:
    of = f" of {size['samples']:,}" if size["pictures"] + size["damaged"] < size["samples"] else ""
    captions = f", {size['captions']:,} captions" if size["captions"] else ""
    return f"{path}: {size['pictures']:,}{of} images{captions}" + (
        f", {size['damaged']:,} damaged left out" if size["damaged"] else ""
    )


def _classes(evaluation: dict[str, Any], most: int = 40) -> str:
    parts = []
    for title, named in (evaluation.get("zeroshot") or {}).items():
        by_class = sorted(named["by_class"].items(), key=lambda item: (-item[1], item[0]))
        about = f"{len(by_class):,} classes"
        if len(by_class) > most:
            by_class = by_class[: most // 2] + by_class[-most // 2 :]
            about += f", the best and the worst {most // 2}"
        bars = "".join(
            f'<div><span>{escape(name)}</span><i style="--w:{100 * share:.1f}%"></i><em>{100 * share:.0f}%</em></div>'
            for name, share in by_class
        )
        prompts = ", ".join(f"“{template}”" for template in named["templates"][:3]) + (
            " …" if len(named["templates"]) > 3 else ""
        )
        parts.append(
            f"<h3>{escape(title)}, zero-shot, class by class ({about}; prompts {escape(prompts)})</h3><div "
            f"class='bars'>{bars}</div>"
        )
    return "".join(parts)


def percent(value: float | None) -> str:
    """0.5 -> 50.0%; nothing where there is no value."""
    return "" if value is None else f"{100 * value:.1f}%"
