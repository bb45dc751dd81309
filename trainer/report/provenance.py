"""The parts of the page that say what was forecast, and what ran and where: all that is needed to do it again."""

from __future__ import annotations

import base64
import re
from html import escape
from typing import Any


def plan_html(svg: str) -> str:
    """The planner's image of a run; nothing where none was drawn. As an image, so that nothing in the file can run or
    load."""
    if not svg:
        return ""
    data = base64.b64encode(svg.encode()).decode()
    return (
        "<h2>Memory forecast</h2><p>What one card would hold at the peak of a step, for every way to place the "
        "tensors, by "
        "<code>python -m trainer.plan</code>. The red words say what a card has for them.</p>"
        f'<img class="plan" alt="stacked bars of forecast memory by ds_config" src="data:image/svg+xml;base64,{data}">'
    )


def provenance_html(evaluation: dict[str, Any], environment: dict[str, Any], recipe: str, deepspeed: str) -> str:
    """Commands, versions, hosts and settings; nothing where none of it is known."""
    parts = []
    if evaluation:
        parts.append(
            _list(
                {"evaluated": evaluation.get("model"), "at": evaluation.get("time"), "with": evaluation.get("command")}
            )
        )
    for start in (environment.get("starts") or [])[-3:]:
        packages = ", ".join(f"{name} {number}" for name, number in (start.get("packages") or {}).items() if number)
        command = start.get("command")
        known = {
            "started": start.get("time"),
            "at": f"{start['samples_seen']:,} pairs" if start.get("samples_seen") else None,
            "with": " ".join(map(str, command)) if isinstance(command, list) else command,
            "in": start.get("directory"),
            "sources": start.get("git"),
            "hosts": ", ".join(f"{host} × {ranks}" for host, ranks in (start.get("hosts") or {}).items()),
            "devices": ", ".join(start.get("devices") or []) or "CPU",
            "versions": f"python {start.get('python')}, {packages}",
        }
        parts.append(_list(known))
    if recipe:
        opened = " open" if len(recipe.splitlines()) <= 40 else ""
        parts.append(f"<details{opened}><summary>recipe.yaml</summary><pre>{_yaml(recipe)}</pre></details>")
    if deepspeed:
        parts.append(f"<details><summary>deepspeed.json</summary><pre>{escape(deepspeed)}</pre></details>")
    return f"<h2>To do it again</h2><p>What ran, and where.</p>{''.join(parts)}" if parts else ""


def _list(facts: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value)
    return f"<dl>{rows}</dl>"


def _yaml(text: str) -> str:
    """Escaped, with keys and comments told apart."""
    lines = []
    for line in escape(text, quote=False).splitlines():
        if line.lstrip().startswith("#"):
            lines.append(f"<i>{line}</i>")
        else:
            lines.append(re.sub(r"^(\s*(?:- )?)([\w.\-]+:)(?=\s|$)", r"\1<b>\2</b>", line))
    return "\n".join(lines)
