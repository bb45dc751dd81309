"""Folders of classes, imagefolders, zips and tars of them: read at their place, and what is wrong in them named."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.picture_files import contents, encoded, picture, rejects, shard
from tests.test_data_tools_sources import captions, metas
from trainer.data.settings import DataSettings
from trainer.evals.examples import Shards, open_examples

Files = dict[str, bytes]
TEMPLATE = ("--caption-template", "a photo of a {class}")


def put(kind: str, place: Path, files: Files) -> Path:
    """``files`` as a folder, a zip, or a tar that may be compressed."""
    if kind == "folder":
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        return place
    path = place.with_name(f"{place.name}.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(pack[kind](raw.getvalue()))
    return path


def png(number: int) -> bytes:
    return encoded(picture(number))


PAIRS = {"a/0.png": png(0), "a/0.txt": b"zero", "a/1.png": png(1), "a/1.json": b'{"caption": "one", "tag": 7}'}
CLASSES = {"pets/big_dog/1.png": png(1), "pets/cat/2.png": png(2), "pets/cat/3.png": png(3), "pets/.DS_Store": b"x"}
KINDS = ["folder", "zip", "tar", "tar.gz", "tar.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind: str, tmp_path: Path) -> None:
    path = put(kind, tmp_path / "in", PAIRS)
    assert shard(path, tmp_path / "out", "--processes", "2", "--shard-size", "1", columns=()) == 0
    assert captions(tmp_path / "out") == ["one", "zero"] and [meta.get("tag") for meta in metas(tmp_path / "out")] == [
        None,
        7,
    ]
    again = contents(tmp_path / "out")
    assert shard(path, tmp_path / "out2", "--shard-size", "1", columns=()) == 0 and contents(tmp_path / "out2") == again


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_classes(kind: str, tmp_path: Path) -> None:
    """``cls`` and classnames.txt are what trainer.evals reads."""
    assert shard(put(kind, tmp_path / "in", CLASSES), tmp_path / "out", columns=TEMPLATE) == 0
    assert captions(tmp_path / "out") == ["a photo of a big dog", "a photo of a cat", "a photo of a cat"]
    examples = open_examples(str(tmp_path / "out"), DataSettings())
    assert isinstance(examples, Shards)  # with all captions; CLIP_benchmark's reader takes a caption a line of .txt
    classes = examples.beside("classnames.txt")
    assert classes is not None and classes.read_text() == "big dog\ncat\n"
    read = [examples.read(number) for number in range(examples.size)]
    assert sorted((one.metadata["cls"], one.metadata["class"]) for one in read) == [
        (0, "big dog"),
        (1, "cat"),
        (1, "cat"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_imagefolders(kind: str, form: str, tmp_path: Path) -> None:
    rows = [{"file_name": "p/0.png", "text": "zero", "n": 1}, {"file_name": "1.png", "text": "one", "n": 2}]
    if form == "jsonl":
        table = "\n".join(map(json.dumps, rows)).encode()
    elif form == "csv":
        table = b"file_name;text;n\np/0.png;zero;1\n1.png;one;2\n"
    else:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        table = buffer.getvalue()
    files = {"in/p/0.png": png(0), "in/1.png": png(1), f"in/metadata.{form}": table}
    assert shard(put(kind, tmp_path / "in", files), tmp_path / "out", columns=()) == 0
    assert captions(tmp_path / "out") == ["one", "zero"] and [int(meta["n"]) for meta in metas(tmp_path / "out")] == [
        1,
        2,
    ]
    assert [meta["sample"]["image"] for meta in metas(tmp_path / "out")] == ["in/p/0.png", "in/1.png"]


def test_metadata_beside_each_folder_and_missing_pictures(tmp_path: Path) -> None:
    for kind in ("folder", "zip"):
        files = {
            f"{name}/metadata.jsonl": json.dumps({"file_name": f"{name}.png", "caption": name}).encode()
            for name in "ab"
        }
        path = (
            put(kind, tmp_path / kind / "in", {})
            if kind == "folder"
            else (tmp_path / kind).mkdir() or tmp_path / kind / "in"
        )
        path = put(kind, path, {**files, "a/a.png": png(0)})
        assert shard(path, tmp_path / f"out-{kind}", "--max-rejected", "1", columns=()) == 0
        assert captions(tmp_path / f"out-{kind}") == ["a"] and rejects(tmp_path / f"out-{kind}") == {
            "metadata.jsonl:1": "file_missing"
        }


def test_one_table_in_a_zip(tmp_path: Path) -> None:
    files = {"flickr/Images/0.png": png(0), "flickr/captions.csv": b"image,caption\n0.png,one\n/etc/passwd,two\n"}
    options = ("--images", "Images", "--max-rejected", "1")
    assert shard(put("zip", tmp_path / "in", files), tmp_path / "out", *options) == 0
    assert captions(tmp_path / "out") == ["one"] and rejects(tmp_path / "out") == {"captions.csv:3": "file_missing"}


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_named_and_chosen(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        f"d/{split}/{name}/{number}.png": png(number) for split in ("train", "test") for number, name in enumerate("ab")
    }
    path = put(kind, tmp_path / "in", files)
    assert shard(path, tmp_path / "out", columns=TEMPLATE) == 2
    assert (
        f"{tmp_path.name}" in (error := capsys.readouterr().err) and "several splits (test, train); name one" in error
    )
    if not kind.startswith("tar."):
        assert f"{path}/d/test" in error and shard(f"{path}/d/train", tmp_path / "out", columns=TEMPLATE) == 0
        assert len(captions(tmp_path / "out")) == 2


def test_one_class_and_no_class_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(put("folder", tmp_path / "in", {"1.png": png(1)}), tmp_path / "out", columns=TEMPLATE) == 2
    assert "there is none; two or more are needed" in capsys.readouterr().err
    assert shard(put("folder", tmp_path / "in", CLASSES), tmp_path / "out", columns=()) == 2
    assert "if folders are classes (cats/1.jpg) add --caption-template" in capsys.readouterr().err


def test_several_zips_of_which_two_hold_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        put("zip", tmp_path / "in" / str(number), {"0.png": png(number), "0.txt": f"of {number}".encode()})
    assert shard(tmp_path / "in", tmp_path / "out", columns=()) == 0 and captions(tmp_path / "out") == ["of 0", "of 1"]
    put("zip", tmp_path / "pictures", {"0.png": png(0)})
    put("zip", tmp_path / "texts", {"0.txt": b"apart"})
    assert shard(tmp_path / "*.zip", tmp_path / "out2", columns=()) == 0 and captions(tmp_path / "out2") == ["apart"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_of_zips(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, data in PAIRS.items():
            archive.writestr(name, data)
    assert shard(tmp_path / "a.zip", tmp_path / "out", columns=()) == 0 and captions(tmp_path / "out") == [
        "one",
        "zero",
    ]


def patched(path: Path, name: str, offset: int, value: bytes) -> None:
    """Overwrites a field of a member's entry in the central directory."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(name.encode()) - 46
    assert raw[at : at + 4] == b"PK\1\2"
    raw[at + offset : at + offset + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (8, b"\1\0", "encrypted"),
        (10, struct.pack("<H", 93), "zip_method"),
        (16, b"\0\0\0\0", "zip_damaged"),
        (24, struct.pack("<L", 10), "zip_bomb"),
        (24, struct.pack("<L", 10**9), "file_too_large"),
        (24, struct.pack("<L", 10**5), "zip_damaged"),
        (42, struct.pack("<L", 7), "zip_damaged"),
    ],
)
def test_what_is_wrong_with_a_member_is_named(offset: int, value: bytes, reason: str, tmp_path: Path) -> None:
    path = put("zip", tmp_path / "in", PAIRS)
    patched(path, "a/1.png", offset, value)
    assert shard(path, tmp_path / "out", "--max-rejected", "1", columns=()) == 0
    assert captions(tmp_path / "out") == ["zero"] and rejects(tmp_path / "out") == {"a/1.png": reason}


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(60 << 20))
        archive.writestr("0.txt", b"bomb")
        archive.writestr("1.png", png(1))
        archive.writestr("1.txt", bytes(60 << 20))
        archive.writestr("2.png", png(2))
        archive.writestr("2.txt", b"sound")
    tracemalloc.start()
    options = ("--max-rejected", "1", "--processes", "1", "--max-bytes", "1000000")
    assert shard(tmp_path / "a.zip", tmp_path / "out", *options, columns=()) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rejects(tmp_path / "out") == {"0.png": "file_too_large", "1.png": "too_large"} and peak < 40 << 20


def test_files_that_are_no_zip_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put("zip", tmp_path / "in", PAIRS)
    path.write_bytes(path.read_bytes()[:-30])
    assert shard(path, tmp_path / "out", columns=()) == 2
    assert "in.zip: not readable as a zip" in (error := capsys.readouterr().err) and error.count("\n") == 1
