"""Scores a checkpoint, an exported model or any Hugging Face CLIP or SigLIP: retrieval both ways and zero-shot
classification.

    python -m trainer.evaluate runs/quickstart       # its best or newest checkpoint, as its recipe's eval: section says
    python -m trainer.evaluate runs/quickstart/export --data demo/shards/test --out evaluation.json
    python -m trainer.evaluate google/siglip-base-patch16-224 --data coco/test --limit 0
    python -m trainer.evaluate runs/lora --against google/siglip-base-patch16-224   # both, and the change
    python -m trainer.evaluate runs/quickstart --ema                                # its averaged weights (optim.ema)
    python -m trainer.evaluate MODEL --data wds_imagenet1k                          # CLIP_benchmark's layout
    python -m trainer.evaluate MODEL --data shards/test --label face --templates '{character}, {face}' --accept faces

On several GPUs: `torchrun --nproc_per_node 8 -m trainer.evaluate ...`. Beside the JSON it writes gallery.json, example
queries with their best answers, which `python -m trainer.report` shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

import trainer
from data_tools.io.errors import run_command
from data_tools.io.files import write_atomic
from trainer import config
from trainer.blend import load_model
from trainer.core import distributed
from trainer.core.help import describe
from trainer.core.settings import check_out, override, parse
from trainer.core.types import UserError
from trainer.data.settings import DataSettings
from trainer.engine.precision import DTYPES, Precision
from trainer.evals import EvalSettings, Evaluation, evaluate
from trainer.evals.gallery import make_gallery
from trainer.models import DualEncoder

LABELS = {"image_to_text_r": "image → caption  R@", "text_to_image_r": "caption → image  R@"}


def main(argv: list[str]) -> int:
    options = _options(argv)
    check_out(Path(options.out) if options.out else None)
    recipe = find_recipe(options.recipe, options.model)
    settings = _settings(options, recipe)
    data = recipe.data if recipe else DataSettings()
    with distributed.process_group() if "RANK" in os.environ else nullcontext():
        model, source = load_model(options.model, options.ema)
        found = _evaluate(model, settings, data, options.precision)
        base = _evaluate(load_model(options.against)[0], settings, data, options.precision) if options.against else None
        if distributed.is_main():
            print(table(found, base, source, options.against))
            if options.out:
                command = shlex.join(["python", "-m", "trainer.evaluate", *argv])
                about = {"model": source, "average": options.ema, "against": options.against, "command": command}
                report = result(found, base, settings, about)
                _save(Path(options.out), report, make_gallery(found))
    return 0


def find_recipe(given: str | None, model: str) -> config.Recipe | None:
    """The ``given`` recipe, or that of the run to which ``model`` (a run, checkpoint or export) belongs; None if there
    is none."""
    if given:
        return config.load(Path(given))
    for folder in (Path(model), Path(model).parent, Path(model).parent.parent):
        if Path(model).is_dir() and (folder / "recipe.yaml").is_file():
            return config.load(folder / "recipe.yaml")
    return None


def _settings(options: argparse.Namespace, recipe: config.Recipe | None) -> EvalSettings:
    tree: dict[str, Any] = recipe.eval.model_dump() if recipe else {"limit": 0}
    if options.data:
        tree["data"] = options.data
    if options.limit is not None:
        tree["limit"] = options.limit
    if options.batch_size is not None:
        tree["batch_size"] = options.batch_size
    if options.label:
        named = {"classes": options.classes, "accept": options.accept, "name": options.name}
        tree["zeroshot"] = [
            {"label": options.label, "templates": options.templates or [], **{k: v for k, v in named.items() if v}}
        ]
    elif options.classes or options.templates or options.accept:
        raise UserError(
            "--classes, --templates and --accept need --label: name the metadata field that holds the class"
        )
    bad = [assignment for assignment in options.overrides if not assignment.startswith("eval.")]
    if bad:
        raise UserError(f"{bad[0]!r}: only eval.key=value can be set here; the rest belongs to the model")
    tree = override(tree, [assignment.removeprefix("eval.") for assignment in options.overrides])
    return parse(EvalSettings, tree, "command line" if recipe is None else "eval")


def _evaluate(model: DualEncoder, settings: EvalSettings, data: DataSettings, precision: str) -> Evaluation:
    device = distributed.device().type
    with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        return evaluate(model, settings, model.preprocess, distributed.rank(), distributed.world_size(), data)


def result(
    found: Evaluation, base: Evaluation | None, settings: EvalSettings, source: dict[str, Any]
) -> dict[str, Any]:
    """The content of evaluation.json: shares in [0, 1], standard errors, ceilings, and all that is needed to reproduce
    them."""
    return {
        **source,
        "metrics": found.metrics,
        "standard_errors": found.errors,
        "ceilings": found.ceilings,
        "base_metrics": base.metrics if base else None,
        "datasets": found.sizes,
        "zeroshot": {
            title: {"classes": len(named.names), "templates": named.templates, "by_class": named.by_class}
            for title, named in found.named.items()
        },
        "settings": settings.model_dump(mode="json"),
        "scale": found.scale,
        "bias": found.bias,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"ringlip": trainer.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "simplejpeg")},
    }


def table(found: Evaluation, base: Evaluation | None, source: str, against: str | None) -> str:
    """The results as text, in percent, with standard errors, the base model's results, and ceilings below 100%."""
    lines = [f"\n{source}" + (f"  against {against}" if base else "")]
    for path, size in found.sizes.items():
        of = f" of {size['samples']:,}" if size["pictures"] + size["damaged"] < size["samples"] else ""
        left = f", {size['damaged']:,} damaged left out" if size["damaged"] else ""
        captions = f" and {size['captions']:,} captions" if size["captions"] else ""
        lines.append(f"{path}: {size['pictures']:,}{of} images{captions}{left}")
    if found.retrieved or found.named:
        lines.append("")
    width = max(len(label(name)) for name in found.metrics)
    for name, value in found.metrics.items():
        error, ceiling = found.errors.get(name), found.ceilings.get(name, 1.0)
        line = f"  {label(name):<{width}}  {100 * value:5.1f}%" + (
            f" ± {100 * error:3.1f}" if error is not None else " " * 6
        )
        if base:
            before = base.metrics[name]
            line += f"   base {100 * before:5.1f}%   change {100 * (value - before):+5.1f}"
        lines.append((line + (f"   a perfect model: {100 * ceiling:5.1f}%" if ceiling < 1 else "")).rstrip())
    return "\n".join(lines)


def label(name: str) -> str:
    """image_to_text_r1 -> image → caption  R@1; face_strict_top1 -> face strict  top-1"""
    for ending, words in LABELS.items():
        head, found, k = name.rpartition(ending)
        if found:
            return f"{head} {words}{k}".strip()
    head, _, measure = name.rpartition("_top")
    return (
        f"{head.replace('_', ' ')}  top-{measure}" if head else name.replace("_mean_per_class", "  mean over classes")
    )


def _save(out: Path, report: dict[str, Any], gallery: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content, indent in ((out.with_name("gallery.json"), gallery, None), (out, report, 1)):
        write_atomic(path, json.dumps(content, ensure_ascii=False, indent=indent))
    print(f"\nwrote {out} and {out.with_name('gallery.json')}")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=__doc__,
        epilog=describe(EvalSettings, "eval."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="DIR", help="a run, one of its checkpoints, a Hugging Face directory or a hub name"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="eval.key=value", help="override the recipe's eval: section"
    )
    parser.add_argument("--data", action="append", metavar="SHARDS", help="evaluate on this instead; may be repeated")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="images per dataset; 0: all, the default without a recipe"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples per forward pass")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="take eval: and data: from this recipe instead of the run's own"
    )
    parser.add_argument("--ema", action="store_true", help="use the running average of a run's weights (optim.ema)")
    parser.add_argument(
        "--against", metavar="BASE", help="another model to compare with, such as the base of a finetuned one"
    )
    parser.add_argument(
        "--out", metavar="evaluation.json", help="write the results to this file, and gallery.json beside it"
    )
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="precision of the towers (default fp32)"
    )
    parser.add_argument("--label", metavar="FIELD", help="zero-shot: the metadata field that holds the class")
    parser.add_argument(
        "--classes", metavar="FILE", help="zero-shot: class names, one per line (default: all that occur)"
    )
    parser.add_argument(
        "--templates",
        action="append",
        metavar="TEXT",
        help="zero-shot: a template, a set or a file; may be repeated",
    )
    parser.add_argument("--accept", metavar="FIELD", help="zero-shot: field with all correct classes of a sample")
    parser.add_argument("--name", help="zero-shot: prefix of its metrics")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
