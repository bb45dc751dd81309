"""Finetunes a model on your own pairs with one command, and reports whether it was worth it.

    python -m trainer.finetune openai/clip-vit-base-patch32 images/                     # shards, a folder or a table
    python -m trainer.finetune MODEL shards/train --general shards/coco                 # measures forgetting on coco
    python -m trainer.finetune MODEL shards/train --for species                         # classification by this field
    python -m trainer.finetune MODEL shards/train --dry-run                             # only writes the recipe

It looks at the model and the data, holds out validation pairs, chooses a recipe and explains the choice, tries learning
rates in short runs, trains, and exports the best checkpoint; with --general it is interpolated with the base (WiSE-FT)
as far as needed to lose at most one point on that set. The output directory then holds recipe.yaml (to change it, edit
it and start the same command again), run/ (the run), model/ (for transformers) and report.html. A stopped command
resumes when it is started again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from data_tools.io.errors import run_command
from data_tools.io.files import write_atomic
from trainer import config
from trainer.core.logs import to_the_terminal
from trainer.core.types import UserError
from trainer.finetune.choose import Plan, choose
from trainer.finetune.data import prepare
from trainer.finetune.finish import finish
from trainer.finetune.sweep import sweep, train
from trainer.models import DualEncoder

logger = logging.getLogger("trainer.finetune")  # not __name__, which is __main__ here


def main(argv: list[str]) -> int:
    options = _options(argv)
    to_the_terminal()
    out = options.out or Path("runs") / f"finetune-{Path(options.model).name}"
    model = DualEncoder.from_pretrained(options.model)
    data, told = prepare(options.data, out, options.validation, options.label, model)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    logger.info("\n".join((f"{options.model}: {model.family}, {size:.1f} M parameters", *told)))
    adapter = {"whole": False, "lora": True, None: None}[options.train]
    gpus = max(1, torch.cuda.device_count())
    plan = choose(
        options.model,
        model,
        data,
        out,
        label=options.label,
        general=options.general,
        replay=options.replay,
        adapter=adapter,
        gpus=gpus,
    )
    del model
    recipe = out / "recipe.yaml"
    if recipe.is_file():
        logger.info(f"{recipe} exists and is used unchanged; delete it to have a recipe chosen again")
    else:
        logger.info("\n".join(plan.reasons))
        if not options.dry_run and not options.no_sweep:
            sweep(plan, options.model, out / "sweep", options.minutes, gpus)
        write_recipe(plan, recipe)
    if options.dry_run:
        print(f"{recipe} written; train it with: deepspeed --module trainer.train {recipe}")
        return 0
    train(recipe, out / "run", gpus)
    return finish(plan, options.model, config.load(recipe), out)


def write_recipe(plan: Plan, path: Path) -> None:
    """The recipe, with what was chosen and why above it."""
    import yaml

    plan.recipe()  # a mistake of ours is told before hours of training
    head = "".join(f"# {line}\n" for line in plan.reasons)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, head + "\n" + yaml.safe_dump(plan.tree, sort_keys=False, allow_unicode=True, width=100))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face CLIP or SigLIP: a directory or a hub name")
    parser.add_argument("data", metavar="DATA", help="shards, a folder of images, or a table of pairs")
    parser.add_argument(
        "--for",
        dest="label",
        default="retrieval",
        metavar="retrieval|FIELD",
        help="what the model is for: retrieval (default), or classification by a metadata field",
    )
    parser.add_argument("--general", metavar="SHARDS", help="pairs on which to measure forgetting; not trained on")
    parser.add_argument("--replay", metavar="SHARDS", help="pairs to mix in against forgetting: 30%% of each batch")
    parser.add_argument("--validation", metavar="SHARDS", help="your own validation pairs, instead of holding some out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory (default runs/finetune-MODEL)")
    parser.add_argument(
        "--train", choices=("whole", "lora"), help="whole towers or a LoRA adapter (default: chosen by model and data)"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="shorten the run to about N minutes")
    parser.add_argument("--no-sweep", action="store_true", help="use the usual learning rate; try no others")
    parser.add_argument("--dry-run", action="store_true", help="write the recipe and stop")
    options = parser.parse_args(argv)
    options.label = None if options.label == "retrieval" else options.label
    if options.minutes is not None and options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g} must be above 0, or left out")
    return options


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
