"""What a finished run leaves: the model to use, its card, the report and one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.io.files import write_atomic
from trainer import checkpoint, evaluate, export, report
from trainer.config import Recipe
from trainer.evals.gallery import make_gallery
from trainer.finetune.choose import Plan
from trainer.finetune.mix import Scores, base_of, measure, mix, tuned_of
from trainer.models import DualEncoder
from trainer.models.card import measured_table


def finish(plan: Plan, path: str, recipe: Recipe, out: Path) -> int:
    """Exports the model that gains most and loses at most LOSS of the general set, and says what was gained."""
    source, record = checkpoint.find_best(recipe.run.directory)
    tuned, base = tuned_of(recipe, path, source), base_of(recipe, path)
    before = measure(base, recipe)
    start = Scores.of(plan, before.metrics)
    share, chosen, after = mix(plan, base, tuned, recipe, start)
    found = Scores.of(plan, after.metrics)
    about = {
        "model": str(out / "model"),
        "average": False,
        "against": path,
        "command": f"python -m trainer.finetune {path} ...",
    }
    result = evaluate.result(after, before, recipe.eval, about)
    _write(chosen, recipe, source, share, path, out, result)
    for folder in (out, recipe.run.directory):
        write_atomic(folder / "evaluation.json", json.dumps(result, ensure_ascii=False, indent=1))
        write_atomic(folder / "gallery.json", json.dumps(make_gallery(after), ensure_ascii=False))
    report.write_report(recipe.run.directory, out / "report.html")
    print(f"{out / 'model'}: for transformers; {out / 'report.html'}: the report; recipe: {out / 'recipe.yaml'}")
    if record is not None and record["samples_seen"] == 0:
        print("no evaluation was better than the base, so the base is exported; more data or another --train may help")
    if share < 1 and isinstance(plan.tree["data"]["train"], str):
        print(
            "unmixed, the trained weights lose more than a point there; --replay with such pairs lets more of them stay"
        )
    print(last_line(plan, start, found, share))
    return 0


def last_line(plan: Plan, before: Scores, after: Scores, share: float) -> str:
    """The one that people look for."""
    what = plan.own[0].removesuffix("_top1") + " top-1" if plan.own[0].endswith("_top1") else "R@1"
    text = f"{what} {100 * before.own:.1f} -> {100 * after.own:.1f}"
    if before.general is None or after.general is None:
        return f"{text} on held-out pairs (forgetting was not measured: give --general SHARDS)"
    mixed = f" (weights: {share:g} trained, {1 - share:g} base)" if share < 1 else ""
    return f"{text}; on your general set {100 * before.general:.1f} -> {100 * after.general:.1f}{mixed}"


def _write(
    model: DualEncoder, recipe: Recipe, source: Path, share: float, path: str, out: Path, result: dict[str, Any]
) -> None:
    between = f"{share:g} of the trained ones, {1 - share:g} of {path} (WiSE-FT, arXiv 2109.01903)"
    mixed = [f"weights: {between if share < 1 else 'as trained'}"]
    text = export.card(model, recipe, recipe.run.directory, source, out / "model", False, False, "transformers", mixed)
    (out / "model").mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "model")
    (out / "model" / "README.md").write_text(text + measured_table(result), encoding="utf-8")
