"""A local page that searches pictures: type words or drop a picture, and see the nearest pictures and captions at once.

    python -m trainer.search runs/quickstart/export demo/shards/test              # then open the address it prints
    python -m trainer.search MODEL OTHER_MODEL SHARDS                             # two models side by side

MODEL is a run, one of its checkpoints, a Hugging Face directory or a hub name. Every picture and its first caption are
embedded once, as columns beside the shards (columns/search-KEY-image.npy and -text.npy, 2 bytes a number; KEY names the
model's weights). A stop in the middle costs at most 8,192 samples: the same command goes on. Every answer is exact.
The page holds no code from outside, and answers this machine alone; with --host, whoever has the token in its address.
Exit codes: 0 ended with Ctrl-C, 2 a mistake in what was given.
"""

from __future__ import annotations

import argparse
import threading

from data_tools.io.formatting import distinct_ends
from trainer.core.types import UserError
from trainer.data.open import open_source
from trainer.data.settings import DataSettings, SourceSettings, sharded
from trainer.evaluate import find_recipe
from trainer.search.library import Library
from trainer.search.model import SearchModel
from trainer.search.server import Server

PORT = 7860


def main(argv: list[str]) -> int:
    options = _options(argv)
    *models, shards = options.paths
    if not models:
        raise UserError(
            f"{shards}: name a model and the shards to search, as in `search runs/quickstart/export {shards}`"
        )
    if len(models) > 2:
        raise UserError(f"{len(models)} models given ({', '.join(models)}): one or two, then the shards")
    with Server(open_library(models, shards, options), options.host, options.port) as server:
        threading.Thread(target=server.library.warm_up, daemon=True).start()
        print(f"\nOpen {server.url}\nCtrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def open_library(models: list[str], shards: str, options: argparse.Namespace) -> Library:
    """Opens the dataset and the models, and embeds what is not embedded yet."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: at least one sample at once")
    recipe = find_recipe(None, models[0])
    data = recipe.data if recipe else DataSettings()
    source = open_source(SourceSettings(path=sharded(shards), caption=options.caption), data)
    opened = [SearchModel.open(model, source, data, options.batch_size, options.ema) for model in models]
    for model, name in zip(opened, distinct_ends(models, 2), strict=True):
        model.name = name
    return Library(source, opened)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", metavar="MODEL [MODEL] SHARDS", help="one or two models, and the folder of shards"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"where it listens (default {PORT}; 0: any free one)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="another address to listen at, such as 0.0.0.0; a token is needed then"
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="samples embedded at once (default 256)"
    )
    parser.add_argument(
        "--caption", metavar="FIELD", help="the field of the caption (default: as the model's run has it)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the running average of a run's weights, where optim.ema was set"
    )
    return parser.parse_args(argv)
