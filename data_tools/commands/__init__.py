"""The commands of ``python -m data_tools``, one a module."""

COMMANDS = {
    "shard": "pairs -> webdataset tars with an index and a manifest",
    "merge": "complete a dataset that several `shard --task I/N` have written",
    "verify": "check a dataset against its manifest; names every damaged sample",
    "index": "write index and manifest for existing webdataset tars",
    "stats": "sizes, captions, languages, duplicates and a contact sheet, as JSON and an HTML page",
    "cat": "print samples",
    "dedup": "drop duplicate images (writes a view, copies nothing)",
    "filter": "keep the samples that meet conditions (writes a view, copies nothing)",
    "join": "add columns (scores, captions, embeddings) beside the tars",
    "vocabulary": "train a word tokenizer on the captions of a dataset",
    "glyphs": "render the demo pairs from matplotlib's fonts",
}
"""Command (also the name of its module) -> what it does."""
