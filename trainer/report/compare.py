"""The page that compares several runs: states, results, overlaid charts and differences of the recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import yaml

from data_tools.io.formatting import count, duration
from trainer.config import Recipe
from trainer.core.settings import differences, parse
from trainer.core.types import UserError
from trainer.report.chart import COLOURS
from trainer.report.page import Facts, percent, whole_page
from trainer.report.run_charts import run_charts, words
from trainer.report.run_state import RunState

MOST_RUNS = len(COLOURS)
Cells = list[str]
"""HTML, a cell a run."""


@dataclass(frozen=True)
class Column:
    """One run: a column of every table."""

    facts: Facts
    state: RunState
    colour: str

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.facts.evaluation

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """With defaults for keys that the run's version did not have; unchanged if this version rejects it; empty if it
        cannot be read."""
        try:
            return parse(Recipe, self.facts.settings, "recipe.yaml").model_dump(mode="json")
        except UserError:
            return self.facts.settings


def render_comparison(facts: Sequence[Facts], states: Sequence[RunState]) -> str:
    """The whole page for at most MOST_RUNS runs with distinct names."""
    runs = [Column(*found) for found in zip(facts, states, COLOURS[: len(facts)], strict=True)]
    names = [one.name for one in runs]
    body = (
        f'<header><div><h1>{len(runs)} runs compared</h1><p class="lead">{escape(", ".join(names))}</p></div>'
        '<button id="theme" title="light or dark">light / dark</button></header>'
        + _standing(runs)
        + _results(runs)
        + _recipes(runs)
        + run_charts({one.name: one.facts.log for one in runs})
        + _places(runs)
    )
    return whole_page(" and ".join(names), body)


def _standing(runs: Sequence[Column]) -> str:
    last = [one.facts.log.last for one in runs]
    recipes = [one.recipe for one in runs]
    states = [one.state for one in runs]

    def each(key: str, show: Any) -> Cells:
        return [escape(show(values[key])) if key in values else "" for values in last]

    rows: list[tuple[str, Cells]] = [
        ("state", [escape(one.state) for one in states]),
        ("pairs seen", [f"{count(one.seen)}<small>{_share(one)}</small>" if one.seen else "" for one in states]),
        ("training time", each("seconds", duration)),
        ("pairs per second", [_usual(one, "pairs_per_second", "{:,.0f}") for one in runs]),
        ("step time", [_usual(one, "step_seconds", "{:.3g} s") for one in runs]),
        ("memory per rank", each("memory_bytes", lambda value: f"{value / 2**30:.2f} GiB")),
        ("objective", [escape(str(_at(recipe, "loss.name") or "")) for recipe in recipes]),
        ("global batch", [_number(_at(recipe, "batch.size")) for recipe in recipes]),
        ("last loss", each("loss", "{:.4g}".format)),
    ]
    notes = [f"<b>{escape(one.name)}</b>: {escape(one.state.note)}" for one in runs if one.state.note]
    objectives = {_at(recipe, "loss.name") for recipe in recipes} - {None}
    if len(objectives) > 1 or len({_at(recipe, "batch.size") for recipe in recipes} - {None}) > 1:
        notes.append("The losses belong to different objectives or batch sizes and are not comparable; the scores are.")
    return _table(runs, rows) + "".join(f'<p class="note">{note}</p>' for note in notes)


def _results(runs: Sequence[Column]) -> str:
    evaluated = [one.evaluation for one in runs]
    metrics = list(dict.fromkeys(name for one in evaluated for name in one.get("metrics") or {}))
    missing = [one for one in runs if not one.evaluation]
    notes = "".join(
        f'<p class="note"><b>{escape(one.name)}</b> is not evaluated yet: <code>python -m trainer.evaluate '
        f"{escape(one.facts.directory)} --out {escape(one.facts.directory)}/evaluation.json</code></p>"
        for one in missing
    )
    if not metrics:
        return f"<h2>Results</h2>{notes}"
    rows = []
    for name in metrics:
        values = [(one.get("metrics") or {}).get(name) for one in evaluated]
        errors = [(one.get("standard_errors") or {}).get(name) for one in evaluated]
        known = sorted(value for value in values if value is not None)
        best = known[-1] if len(known) > 1 else None
        cells = [
            "" if value is None else (f"<b>{percent(value)}</b>" if value == best else percent(value)) + _error(error)
            for value, error in zip(values, errors, strict=True)
        ]
        rows.append((words(name), cells))
    data = {json.dumps(one.get("datasets"), sort_keys=True) for one in evaluated if one}
    if len(data) > 1:
        named = "; ".join(
            f"{one.name}: {', '.join(one.evaluation.get('datasets') or {})}" for one in runs if one.evaluation
        )
        notes += f'<p class="note">Not evaluated on the same data, so not directly comparable: {escape(named)}.</p>'
    about = "The best of each row is bold; ± is the standard error. Differences below two of them may be chance."
    return f"<h2>Results</h2><p>{about}</p>{_table(runs, rows)}{notes}"


def _recipes(runs: Sequence[Column]) -> str:
    """Differences from the first readable recipe."""
    readable = [one for one in runs if one.recipe]
    learned: dict[str, None] = {}
    cost: dict[str, None] = {}
    for other in readable[1:]:
        for key, _, _, operational in differences(Recipe, readable[0].recipe, other.recipe):
            (cost if operational else learned)[key] = None
    parts = ["<h2>Recipes</h2>"]
    parts += [
        f'<p class="note"><b>{escape(one.name)}</b>: its recipe.yaml cannot be read.</p>'
        for one in runs
        if not one.recipe
    ]
    if learned:
        parts.append("<p>Keys that affect what is learned and whose values differ.</p>")
        parts.append(_values(readable, list(learned)))
    elif len(readable) > 1:
        parts.append("<p>The recipes do not differ in anything that affects what is learned.</p>")
    if cost:
        parts.append(
            f"<details><summary>Differences that affect only cost, storage or output: {len(cost)}</summary>"
            f"{_values(readable, list(cost))}</details>"
        )
    return "".join(parts)


def _places(runs: Sequence[Column]) -> str:
    """Differences of environments."""
    starts = [(one.facts.environment.get("starts") or [{}])[-1] for one in runs]
    found: list[dict[str, str]] = [
        {
            "started": str(start.get("time") or ""),
            "sources": str(start.get("git") or ""),
            "hosts": ", ".join(f"{host} × {ranks}" for host, ranks in (start.get("hosts") or {}).items()),
            "devices": ", ".join(start.get("devices") or ["CPU"]),
            "python": str(start.get("python") or ""),
            **{name: str(number or "") for name, number in (start.get("packages") or {}).items()},
        }
        for start in starts
    ]
    keys = dict.fromkeys(key for one in found for key in one)
    rows = [
        (key, [escape(one.get(key, "")) for one in found])
        for key in keys
        if len({one.get(key, "") for one in found}) > 1
    ]
    return f"<h2>Environments</h2><p>Only what differs.</p>{_table(runs, rows, text=True)}" if rows else ""


def _values(runs: Sequence[Column], keys: list[str]) -> str:
    rows = []
    for key in keys:
        values = [_at(one.recipe, key) for one in runs]
        cells = ["<small>null</small>" if value is None else f"<code>{escape(_yaml(value))}</code>" for value in values]
        rows.append((key, cells))
    return _table(runs, rows, text=True)


def _table(runs: Sequence[Column], rows: Sequence[tuple[str, Cells]], text: bool = False) -> str:
    """One column per run, with the colour of its curves; empty rows are omitted. ``text``: aligned left, with values
    that differ from the first run highlighted."""
    kind = "text run" if text else "run"
    names = [f'<span class="key" style="--s:var(--{one.colour})"><i></i>{escape(one.name)}</span>' for one in runs]
    head = "<th></th>" + "".join(f'<th class="{kind}">{name}</th>' for name in names)
    lines = []
    for title, cells in rows:
        if any(cells):
            kinds = [("text other" if cell != cells[0] else "text") if text else "" for cell in cells]
            shown = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, cells, strict=True))
            lines.append(f"<tr><td>{escape(title)}</td>{shown}</tr>")
    return f'<div class="table wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _share(state: RunState) -> str:
    return f" of {count(state.total)}" if state.total and state.seen < state.total else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _usual(run: Column, key: str, form: str) -> str:
    return form.format(run.facts.log.usual(key)) if key in run.facts.log.columns else ""


def _error(error: float | None) -> str:
    return f" <small>± {100 * error:.1f}</small>" if error else ""


def _at(tree: dict[str, Any], dotted: str) -> Any:
    """The value of a dotted key, None if it is absent."""
    value: Any = tree
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n...\n").strip()
    )
