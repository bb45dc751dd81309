"""Serves a local web page for searching your images: type words or drag in an image to see the nearest images
and captions.

    python -m trainer.search runs/quickstart/export demo/shards/test      # then open the address it prints
    python -m trainer.search MODEL OTHER_MODEL SHARDS                     # two models side by side
    python -m trainer.search MODEL SHARDS --forget-others                 # deletes the embeddings of other models

MODEL is a run, one of its checkpoints, a Hugging Face directory or a hub name. The first start embeds every image and
its first caption and stores them beside the shards (columns/search-KEY-image.npy and -text.npy, float16; KEY identifies
the model's weights). An interrupted start resumes when the same command is run again. Search is exact, not approximate.

The server listens on 127.0.0.1 and rejects requests from other sites. With --host it listens on another address and
requires the token that is part of the printed URL. Exit codes: 0 stopped with Ctrl-C, 2 invalid arguments or data.
"""

from __future__ import annotations

import argparse
import logging
import threading

from data_tools.format.columns import remove_columns
from data_tools.format.index import Dataset
from data_tools.io.formatting import distinct_ends, human_bytes
from trainer.core.types import UserError
from trainer.data.open import open_source
from trainer.data.settings import DataSettings, SourceSettings, sharded
from trainer.evaluate import find_recipe
from trainer.search.library import Library
from trainer.search.model import SEARCH_COLUMN, SearchModel
from trainer.search.server import Server

logger = logging.getLogger(__name__)
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
        print(f"\nOpen {server.url}\nStop with Ctrl-C.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def open_library(models: list[str], shards: str, options: argparse.Namespace) -> Library:
    """Opens the dataset and the models; computes the embeddings that are missing."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be 1 or more")
    recipe = find_recipe(None, models[0])
    data = recipe.data if recipe else DataSettings()
    settings = SourceSettings(path=sharded(shards), caption=options.caption)
    source = open_source(settings, data)
    opened = [SearchModel.open(model, source, data, options.batch_size, options.ema) for model in models]
    if options.forget_others:
        forget(source.dataset.root, keep={column for model in opened for column in model.columns})
    for model, name in zip(opened, distinct_ends(models, 2), strict=True):
        model.name = name
    return Library(open_source(settings, data), opened)  # opened again, as its columns have changed


def forget(root: str, keep: set[str]) -> None:
    """Deletes the search columns of a dataset that are not in ``keep``."""
    dataset = Dataset.open(root)
    names = [name for name in dataset.columns if SEARCH_COLUMN.fullmatch(name) and name not in keep]
    freed = remove_columns(dataset, names)
    logger.info(f"{root}: deleted {len(names)} columns of other models ({human_bytes(freed)})")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.search",
        usage="%(prog)s MODEL [MODEL] SHARDS [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="MODEL SHARDS", help="one or two models, then the folder of shards")
    parser.add_argument("--port", type=int, default=PORT, help=f"port to listen on (default {PORT}; 0: any free port)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on, such as 0.0.0.0 (then a token is required)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="samples per forward pass (default 256)"
    )
    parser.add_argument(
        "--caption", metavar="FIELD", help="field that holds the caption (default: data.caption of the run)"
    )
    parser.add_argument("--ema", action="store_true", help="use the averaged weights of a run (optim.ema)")
    parser.add_argument(
        "--forget-others", action="store_true", help="delete the stored search embeddings of other models"
    )
    return parser.parse_args(argv)
