"""Images on the web are not fetched here: an error names the command that does, and how to shard its output.

Fetching well means retries, limits for each host, opt-out headers (X-Robots-Tag: noai), DNS at scale and no private
addresses. img2dataset does that and is maintained; its output is an input of `shard`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

_FORMATS = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "parquet": "parquet"}


def fetch_first(path: Path, kind: str, image: str, caption: str, example: str) -> str:
    """The error for a table whose ``image`` column holds web addresses such as ``example``."""
    if kind not in _FORMATS:
        return (
            f"{path}: its images are web addresses ({example[:100]}); write the table as Parquet "
            f"(dataset.to_parquet) and shard that: its error will say how to fetch them"
        )
    return f"{path}: its images are web addresses ({example[:100]}); {_command(path, _FORMATS[kind], image, caption)}"


def list_of_addresses(path: Path) -> str:
    """The error for a text file, which may be a list of addresses: images without texts cannot be used."""
    command = _command(Path("pairs.csv"), "csv", "url", "caption")
    return (
        f"{path}: a text file; for a table add --input csv|tsv|jsonl. A list of web addresses has no captions: write a "
        f"table pairs.csv with the columns url and caption, then {command}"
    )


def _command(path: Path, form: str, image: str, caption: str) -> str:
    folder = shlex.quote(f"{path.name.partition('.')[0]}-fetched")
    columns = f"--url_col {shlex.quote(image)} --caption_col {shlex.quote(caption)}"
    fetch = f"img2dataset --url_list {shlex.quote(str(path))} --input_format {form} {columns}"
    written = f"--output_format webdataset --output_folder {folder} --disable_all_reencoding True"
    return f"fetch them: pip install img2dataset && {fetch} {written}, then: python -m data_tools shard {folder} OUT"
