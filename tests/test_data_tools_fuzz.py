"""A bounded, seeded fuzzer of everything that reads other people's files: tables, zips, tars, indexes and recipes.

Whatever the bytes are, a reader ends in rows, in named rejects or in one UserError, within its time and memory:

    python -m pytest tests/test_data_tools_fuzz.py                       # 25 inputs for each reader
    python -m pytest tests/test_data_tools_fuzz.py -m slow               # 1,000 inputs for each, some minutes
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from data_tools.format.index import Dataset
from data_tools.format.scan import scan_tar
from data_tools.io.errors import UserError
from data_tools.samples.reject import REASONS, Reject
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.base import read_image
from tests.support.picture_files import encoded, picture, shard, write_pairs
from trainer.config import load
from trainer.core.types import UserError as TrainerError

MEMORY = 64 << 20
COLUMNS = SourceOptions(image="image", captions=("caption",))
PNG = encoded(picture(0, 8, 8))
ROWS = [{"image": "0.png", "caption": "a; b, c", "d": {"en": ["x"]}}, {"image": None, "caption": 'say "hi"'}]

Mutation = tuple[float, int, bytes, bool]
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 600), st.binary(max_size=40), st.booleans()), min_size=1, max_size=6
)


def mutated(raw: bytes, mutations: list[Mutation]) -> bytes:
    """``raw`` with bytes overwritten, put in, cut out or the rest dropped."""
    for place, length, value, insert in mutations:
        at = int(place * len(raw))
        raw = raw[:at] + value + raw[at + (length if insert else len(value)) :]
    return raw


def packed(form: str) -> bytes:
    buffer = io.BytesIO()
    members = {"a/0.png": PNG, "a/0.txt": b"zero", "b/1.png": PNG, "b/1.json": b'{"caption": "one"}'}
    if form == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


CORPUS = {
    "csv": b'image,caption\r\n0.png,"two\nlines"\r\n1.png,\xc3\xa9\r\n',
    "tsv": b"image\tcaption\n0.png\tone\n",
    "utf16.csv": "image;caption\n0.png;é\n".encode("utf-16"),
    "jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "jsonl.gz": gzip.compress("\n".join(map(json.dumps, ROWS)).encode()),
    "json": b'{"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}',
    "zip": packed("zip"),
    "tar": packed("tar"),
    "tar.gz": gzip.compress(packed("tar")),
    "parquet": packed("parquet"),
}


def bounded(read: Callable[[], None]) -> None:
    """``read()`` may end in a UserError; what it takes stays small."""
    tracemalloc.start()
    try:
        read()
    except (UserError, TrainerError) as error:
        assert "\n" not in str(error) or isinstance(error, TrainerError)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak >> 20} MiB"


def read_input(form: str, raw: bytes, folder: Path) -> None:
    path = folder / f"input.{form}"
    path.write_bytes(raw)
    table = form.rpartition(".")[2] in ("csv", "tsv", "jsonl", "parquet") or form == "jsonl.gz"
    for options in (
        (COLUMNS, SourceOptions(image="image", captions=("d.en",))) if table else (SourceOptions(), _CLASSES)
    ):
        bounded(lambda options=options: read_rows(path, options))  # type: ignore[misc]


_CLASSES = SourceOptions(templates=("a photo of a {class}",))


def read_rows(path: Path, options: SourceOptions) -> None:
    source = open_source(str(path), None, options)
    assert all(problem.reason in REASONS for problem in source.problems) and source.fingerprint()
    count = sum(source.blocks)
    rows = list(source.rows(np.arange(min(count, 500))[::-1]))
    assert len(rows) == min(count, 500)
    for row in rows:
        json.dumps(row.columns, allow_nan=False)
        assert row.fault is None or row.fault in REASONS
        try:
            if row.fault is None:
                read_image(row, str(path.parent), 1 << 20)
        except Reject as reject:
            assert reject.reason in REASONS


def fuzz(test: Callable[[list[Mutation]], None], examples: int) -> None:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    limits = settings(max_examples=examples, deadline=5000, database=None, suppress_health_check=quiet)
    seed(14)(limits(given(MUTATIONS)(test)))()


EFFORT = [25, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", EFFORT)
@pytest.mark.parametrize("form", CORPUS)
def test_inputs(form: str, examples: int, tmp_path: Path) -> None:
    bounded(lambda: read_rows_of(form, tmp_path))
    fuzz(lambda mutations: read_input(form, mutated(CORPUS[form], mutations), tmp_path), examples)


def read_rows_of(form: str, folder: Path) -> None:
    """The corpus itself is read: what is mutated is not refused from the start."""
    path = folder / f"sound.{form}"
    path.write_bytes(CORPUS[form])
    table = form.partition(".")[0] in ("csv", "tsv", "jsonl", "parquet", "utf16")
    source = open_source(str(path), None, COLUMNS if table else SourceOptions())
    assert any(row.fault is None for row in source.rows(np.arange(sum(source.blocks))))


@pytest.mark.parametrize("examples", EFFORT)
@pytest.mark.parametrize("name", ["00000.idx", "manifest.json", "00000.tar"])
def test_indexes(name: str, examples: int, tmp_path: Path) -> None:
    assert shard(write_pairs(tmp_path / "in", 4, "PNG"), tmp_path / "out") == 0
    path = tmp_path / "out" / name
    sound = path.read_bytes()

    def read() -> None:
        dataset = Dataset.open(tmp_path / "out")
        for number in range(min(dataset.num_shards, 10)):
            np.asarray(dataset.shard(number))

    def test(mutations: list[Mutation]) -> None:
        path.write_bytes(mutated(sound, mutations))
        bounded(read)
        if name.endswith(".tar"):
            bounded(lambda: [p.reason for p in scan_tar(path)[1]] and None)

    fuzz(test, examples)


@pytest.mark.parametrize("examples", EFFORT)
def test_recipes(examples: int, tmp_path: Path) -> None:
    sound = (Path(__file__).parent.parent / "trainer/recipes/glyphs.yaml").read_bytes()
    path = tmp_path / "recipe.yaml"

    def test(mutations: list[Mutation]) -> None:
        path.write_bytes(mutated(sound, mutations))
        bounded(lambda: load(path, []) and None)

    fuzz(test, examples)
