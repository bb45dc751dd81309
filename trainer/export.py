"""Writes a trained model as a plain Hugging Face directory, or its LoRA adapter as a plain PEFT directory.

    python -m trainer.export runs/quickstart runs/quickstart/export  # AutoModel, AutoProcessor load it
    python -m trainer.export runs/lora runs/lora/adapter  # peft.PeftModel.from_pretrained(base, ...)
    python -m trainer.export runs/lora runs/lora/export --merge  # the base with the adapter merged into it
    python -m trainer.export runs/quickstart OUT --format open_clip  # or sentence-transformers, onnx
    python -m trainer.export runs/a OUT --average runs/b runs/c  # the mean of their weights (model soup)
    python -m trainer.export runs/a OUT --interpolate openai/clip-vit-base-patch32 0.5  # half way back (WiSE-FT)
    python -m trainer.export runs/quickstart/checkpoints/samples-000100000 OUT          # an earlier state

Reads the run's recipe and its best checkpoint if `checkpoint.best` kept one, else its newest undamaged one, from any
ZeRO stage and number of ranks; needs no GPU. The model card contains the numbers of the run's evaluation.json if they
were measured on the exported checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.io.errors import run_command
from trainer import checkpoint, config
from trainer.blend import blend, load_model
from trainer.config import Recipe
from trainer.core.types import UserError
from trainer.models import DualEncoder
from trainer.models.card import adapter_card, measured_table, whole_card
from trainer.models.formats import FORMATS
from trainer.models.pooling import other_pooling

MARKS = ("config.json", "adapter_config.json", "open_clip_config.json")
"""Every export has one of these files; it is written last."""
WRITTEN = (
    *MARKS,
    *("ringlip.json", "adapter_model.safetensors", "model*.safetensors", "model.safetensors.index.json"),
    *("open_clip_model.safetensors", "modules.json", "sentence_bert_config.json", "image.onnx", "text.onnx"),
)
"""Files that would be read together with another export: transformers applies an adapter that it finds in a model's
directory."""


def main(argv: list[str]) -> int:
    options = _options(argv)
    run, out = find_run(options.run), options.out
    recipe = config.load(run / "recipe.yaml")
    if options.merge and recipe.model.lora is None:
        raise UserError(
            f"{run}: --merge, but its recipe has no model.lora: remove --merge, the whole model is written anyway"
        )
    if recipe.model.lora is not None and not options.merge and options.format != "transformers":
        raise UserError(f"{run}: --format {options.format} needs the whole model: add --merge")
    if recipe.model.lora is not None and recipe.model.path is None and not options.merge:
        raise UserError(f"{run}: its base is not a pretrained model that PEFT could load the adapter on: add --merge")
    if recipe.model.lora is not None and not options.merge and (options.average or options.interpolate):
        raise UserError(f"{run}: a mean of models is no adapter: add --merge to --average and --interpolate")
    _check_out(out)
    chosen, best = checkpoint.find_best(options.run)
    model, source = checkpoint.load_model(recipe.model, chosen, options.ema)
    model, mixed = _mix(model, options)
    adapter = recipe.model.lora is not None and not options.merge
    text = card(model, recipe, run, source, out, adapter, options.ema, options.format, mixed)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        model.save_adapter(aside) if adapter else FORMATS[options.format](model, Path(aside), model.state_dict())
        (Path(aside) / "README.md").write_text(text, encoding="utf-8")
        replace(Path(aside), out)
    if (pooling := other_pooling(model.towers.config)) is not None:
        print(
            f"{out}: transformers' VisionTextDualEncoderModel does not pool as this model does ({pooling}): use the "
            "lines "
            "in its README.md"
        )
    print(f"{out}: {'adapter of ' + str(recipe.model.path) if adapter else 'model'} from {source}{best_words(best)}")
    if best is not None and best.get("weights") == "ema" and not options.ema:
        print(f"{out}: that score is of the averaged weights: export with --ema to get them")
    return 0


def best_words(best: dict[str, Any] | None) -> str:
    """Why this checkpoint: nothing to say of the newest."""
    if best is None:
        return ""
    where = ": the model that the run began with" if best["samples_seen"] == 0 else ""
    return (
        f" (best by {' and '.join(best['metric'])}, {best['score']:.1%}{where}; name another checkpoint to export that)"
    )


def _mix(model: DualEncoder, options: argparse.Namespace) -> tuple[DualEncoder, list[str]]:
    """The model that --average and --interpolate make of the run's, and what they did, for the card."""
    notes = []
    if options.average:
        others = [load_model(where, options.ema)[0] for where in options.average]
        names = [str(options.run), *options.average]
        model = blend([model, *others], [1 / len(names)] * len(names), names)
        notes.append(f"weights: the mean of {', '.join(names)} (a model soup, arXiv 2203.05482)")
    if options.interpolate:
        base, share = options.interpolate[0], _share(options.interpolate[1])
        model = blend([model, load_model(base)[0]], [share, 1 - share], [str(options.run), base])
        notes.append(f"weights: {share:g} of these and {1 - share:g} of {base} (WiSE-FT, arXiv 2109.01903)")
    return model, notes


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--interpolate BASE SHARE: SHARE, that of the run's weights, is 0 to 1, not {text!r}")
    return share


def replace(aside: Path, out: Path) -> None:
    """Moves an export from ``aside`` to ``out`` and removes files of an earlier one that would be read with it."""
    made = {path.name for path in aside.iterdir()}
    earlier = [path for pattern in WRITTEN for path in out.glob(pattern) if path.name not in made]
    for path in sorted(earlier, key=lambda path: path.name not in MARKS):
        path.unlink()
    for path in sorted(aside.iterdir(), key=lambda path: path.name in MARKS):
        if path.is_dir() and (out / path.name).is_dir():
            shutil.rmtree(out / path.name)
        os.replace(path, out / path.name)


def find_run(where: Path) -> Path:
    """The run directory of ``where``, which is a run or one of its checkpoints."""
    for folder in (where, where.parent.parent):
        if (folder / "recipe.yaml").is_file():
            return folder
    raise UserError(f"{where}: neither a run directory (no recipe.yaml there) nor one of its checkpoints/samples-*")


def _check_out(out: Path) -> None:
    if out.is_file():
        raise UserError(f"{out} is a file: name a directory")
    if out.is_dir() and any(out.iterdir()) and not any(next(out.glob(pattern), None) for pattern in WRITTEN):
        raise UserError(f"{out} contains something other than a model: name a new directory, or empty it")


def card(
    model: DualEncoder,
    recipe: Recipe,
    run: Path,
    source: Path,
    out: Path,
    adapter: bool,
    average: bool,
    format_name: str,
    mixed: Sequence[str] = (),
) -> str:
    """The text of README.md."""
    scale, bias = (value.item() for value in model.head())
    notes = [
        f"{json.loads((source / 'checkpoint.json').read_text())['samples_seen']:,} pairs seen, global batch "
        f"{recipe.batch.size:,}, loss `{recipe.loss.name}`",
        f"temperature t = {scale:.4g}, bias b = {bias:.4g}: logits are t · cosine + b",
    ]
    notes += mixed
    if average:
        notes.append(f"weights: running average with decay {recipe.optim.ema:g} a step")
    if adapter:
        notes.append("the trained temperature and bias are in ringlip.json; PEFT keeps the base's")
    elif not model.family.startswith("siglip") and model.head.logit_bias is not None:
        notes.append(
            "transformers has no bias for this model: b is in config.json as `logit_bias`, add it to the logits"
        )
    found = None if mixed else _evaluation(run, source, average)
    measured = measured_table(found) if found else ""
    if adapter:
        return adapter_card(model, str(out), notes, measured)
    return whole_card(model, str(out), notes, measured, format_name)


def _evaluation(run: Path, source: Path, average: bool) -> dict[str, Any] | None:
    path = run / "evaluation.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if Path(found["model"]).resolve() == source.resolve() and found.get("average", False) == average:
        return found
    which = " (averaged weights)" if found.get("average") else ""
    print(f"{path} was measured on {found['model']}{which}, not on {source}: the card does not show its results")
    return None


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run directory (its best checkpoint where checkpoint.best kept one, else the newest), or a checkpoint",
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the directory to write; replaces an earlier export there"
    )
    parser.add_argument("--ema", action="store_true", help="export the running average of the weights (optim.ema)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="transformers",
        help="transformers (default), open_clip, sentence-transformers, or onnx (image.onnx and text.onnx)",
    )
    parser.add_argument(
        "--average",
        nargs="+",
        default=[],
        metavar="OTHER",
        help="the mean of the run's weights and those of other runs, checkpoints or model directories (model soup)",
    )
    parser.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("BASE", "SHARE"),
        help="mix SHARE (0 to 1) of the run's weights with BASE, which it started from (WiSE-FT); 0.5 is usual",
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the LoRA adapter into the base and write the whole model"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
