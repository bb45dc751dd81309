"""python -m data_tools VERB ...: one verb a file, loaded when it is called."""

from __future__ import annotations

import importlib
import io
import sys

from data_tools.io.errors import run_verb

VERBS = {
    "glyphs": ("glyphs", "render the demo pairs from matplotlib's fonts"),
    "vocabulary": ("vocabulary", "train a word tokenizer on the captions of a dataset"),
    "shard": ("shard", "pairs -> webdataset tars with an index and a manifest"),
    "merge": ("merge", "end a run of several `shard --task i/n`"),
    "verify": ("verify", "is a dataset still what was written? Names every damaged sample"),
    "index": ("index", "index and manifest for tars of any maker"),
    "stats": ("stats", "sizes, captions, languages, duplicates and a contact sheet, as JSON and an HTML page"),
    "cat": ("cat", "look at samples"),
    "dedup": ("dedup", "drop pictures that are there twice, as a view"),
    "filter": ("filter", "keep the samples that meet conditions, as a view"),
    "join": ("join", "lay columns (scores, captions, embeddings) beside the tars"),
}
"""Verb -> (module of data_tools with its ``main``, what it does)."""


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {name:<11} {about}" for name, (_, about) in VERBS.items()]
    return "\n".join(["usage: python -m data_tools VERB ...    (VERB --help says more)", "", *lines])


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"error: no verb {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"data_tools.commands.{VERBS[argv[0]][0]}")
    return run_verb(module.main, argv[1:])


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # keys of other makers' tars may be no UTF-8: they are shown, not refused
    sys.exit(main(sys.argv[1:]))
