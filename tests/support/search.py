"""A small searched dataset: images of noise with captions and fields, some of them hostile, and two tiny models."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.commands import shard
from tests.support.tiny_models import tiny_captions, tiny_model
from trainer.search.library import Library
from trainer.search.server import Server

ROWS = 60
HOSTILE = [
    "<img src=x onerror=\"window.hacked='img'\"><script>window.hacked='script'</script>",
    "\u202ereversed \u2066 \"quotes\" & 'more' </button></script> javascript:alert(1)",
    "x" * 3000,
]
FIELD = '<b>bold</b> & "field"'
"""The name of a field, hostile too."""


def make_world(folder: Path) -> Path:
    """``folder`` with shards (60 samples with the fields kind and weight) and the models one and two."""
    dice = np.random.default_rng(0)
    captions = HOSTILE + tiny_captions(ROWS - len(HOSTILE))
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "kind", "weight", FIELD])
        for number, caption in enumerate(captions):
            Image.fromarray(dice.integers(0, 256, (24, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            table.writerow([f"{number}.png", caption, ["cat", "Dog", "house"][number % 3], number / 10, HOSTILE[0]])
    options = ["--image", "image", "--caption", "caption", "--shard-size", "25", "--processes", "1", "--quiet"]
    assert shard.main([str(folder / "pairs.csv"), str(folder / "shards"), *options]) == 0
    for name, kind, seed in (("one", "siglip", 1), ("two", "clip", 2)):
        tiny_model(kind, seed=seed).save_pretrained(folder / name)
    return folder


@contextmanager
def serving(library: Library, host: str = "127.0.0.1") -> Iterator[Server]:
    """A server at a free port, for as long as this lasts."""
    with Server(library, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
