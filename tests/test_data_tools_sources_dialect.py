"""Tables as Excel and others write them: delimiters, encodings, compressed files."""

from __future__ import annotations

import bz2
import gzip
import tracemalloc
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pytest

from data_tools.sources import unpacked
from tests.support.picture_files import COLUMNS, rejects, shard
from tests.test_data_tools_sources import captions, pictures

ROWS = [("image", "caption", "note"), ("0.png", "ein Käfer, grün", "a;b|c"), ("1.png", "zwei", "")]


def table(delimiter: str) -> str:
    return "".join(
        delimiter.join(f'"{cell}"' if set(cell) & set(",;|\t") else cell for cell in row) + "\r\n" for row in ROWS
    )


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_delimiters_and_encodings_are_found(tmp_path: Path, delimiter: str, encoding: str) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "a.csv").write_bytes(table(delimiter).encode(encoding))
    options = ("--encoding", "cp1252") if encoding == "cp1252" else ()
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--processes", "1", *options) == 0
    assert captions(tmp_path / "out") == ["ein Käfer, grün", "zwei"]


def test_a_tsv_may_have_commas_and_a_csv_without_header_its_delimiter(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "a.tsv").write_text("image,caption\n0.png,one\n1.png,two\n")
    assert shard(tmp_path / "a.tsv", tmp_path / "out") == 0 and captions(tmp_path / "out") == ["one", "two"]
    (tmp_path / "b.csv").write_text("0.png;one, two\n1.png;two\n")
    assert shard(tmp_path / "b.csv", tmp_path / "out2", "--columns", "image,caption") == 0
    assert captions(tmp_path / "out2") == ["one, two", "two"]


def test_a_separator_line_of_excel_is_believed(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "a.csv").write_text('sep=#\nimage#caption\n0.png#"one\nline"\n1.png#two\nmore\n')
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--max-rejected", "1") == 0
    assert captions(tmp_path / "out") == ["one line", "two"] and rejects(tmp_path / "out") == {
        "a.csv:6": "wrong_fields"
    }


def test_the_delimiter_can_be_given_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "a.csv").write_text("image^caption\n0.png^one\n")
    assert shard(tmp_path / "a.csv", tmp_path / "out") == 2
    assert (
        "no column 'image' (--image); there are: image^caption; fields are split at ',' (--delimiter"
        in capsys.readouterr().err
    )
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--delimiter", "^") == 0
    for wrong, said in (("ab", "is not one character"), ('"', "is not one character")):
        assert shard(tmp_path / "a.csv", tmp_path / "out", "--delimiter", wrong) == 2
        assert said in capsys.readouterr().err
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--encoding", "klingon") == 2
    assert "no encoding 'klingon'" in capsys.readouterr().err
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--encoding", "base64") == 2


def test_a_file_in_another_encoding_is_refused_before_rows_are_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "a.csv").write_bytes(table(";").encode("cp1252"))
    assert shard(tmp_path / "a.csv", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1 of the first 3 lines are not UTF-8; add --encoding cp1252" in error and error.count("\n") == 1


def test_broken_utf16_costs_its_own_row(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    raw = "image,caption\n0.png,one\n1.png,t?o\n0.png,three\n".encode("utf-16-le").replace(
        "?".encode("utf-16-le"), b"\x00\xd8"
    )
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe" + raw)
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--max-rejected", "1") == 0
    assert captions(tmp_path / "out") == ["one", "three"] and rejects(tmp_path / "out") == {"a.csv:3": "not_utf8"}


def test_compressed_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, 1)
    raw = b'{"image": "0.png", "caption": "one"}\n'
    forms = {"gz": gzip.compress(raw), "bz2": bz2.compress(raw), "zst": pa.compress(raw, "zstd", asbytes=True)}
    for suffix, data in forms.items():
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(data)
        assert shard(path, tmp_path / suffix) == 0 and captions(tmp_path / suffix) == ["one"]
        path.write_bytes(data[:-4])
        if suffix != "zst":  # the cut is behind its data
            assert shard(path, tmp_path / "cut") == 2
            assert f"a.jsonl.{suffix}: cannot be unpacked" in capsys.readouterr().err
    (tmp_path / "a.csv.xz").write_bytes(b"\xfd7zXZ\0")
    assert shard(tmp_path / "a.csv.xz", tmp_path / "out") == 2 and "xz -dk" in capsys.readouterr().err


def test_what_unpacks_without_end_is_stopped_by_room_and_not_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = gzip.compress(bytes(40 << 20))
    (tmp_path / "a.csv.gz").write_bytes(bomb)
    left = iter(range(5))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda _: usage((1 << 30) + ((4 - next(left)) << 22)))
    tracemalloc.start()
    assert shard(tmp_path / "a.csv.gz", tmp_path / "out") == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "does not fit in" in capsys.readouterr().err and peak < 64 << 20


def test_several_tables_are_one(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    for number in range(2):
        (tmp_path / f"{number}.csv").write_text(
            f"image,caption\n{2 * number}.png,a{number}\n{2 * number + 1}.png,b{number}\n"
        )
    assert shard(tmp_path / "[01].csv", tmp_path / "out", "--shard-size", "2", "--processes", "2") == 0
    assert captions(tmp_path / "out") == ["a0", "a1", "b0", "b1"]


def test_web_addresses_are_named_with_the_command_that_fetches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("url,text\n,no image\nhttps://example.org/1.jpg,one\n")
    columns = ("--image", "url", "--caption", "text")
    assert shard(tmp_path / "a.csv", tmp_path / "out", columns=columns) == 2
    error = capsys.readouterr().err
    assert (
        f"pip install img2dataset && img2dataset --url_list {tmp_path}/a.csv --input_format csv --url_col url" in error
    )
    assert "then: python -m data_tools shard a-fetched OUT" in error and error.count("\n") == 1
    (tmp_path / "urls.txt").write_text("https://example.org/1.jpg\n")
    assert shard(tmp_path / "urls.txt", tmp_path / "out", columns=()) == 2
    assert "A list of web addresses has no captions" in capsys.readouterr().err


def test_no_row_of_a_table_makes_this_machine_fetch(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    lines = ["0.png", "http://169.254.169.254/latest", "simplecache::https://10.0.0.1/a.png", "HTTP://localhost/a.png"]
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{line},x\n" for line in lines))
    assert shard(tmp_path / "a.csv", tmp_path / "out", "--max-rejected", "1", columns=COLUMNS) == 0
    assert rejects(tmp_path / "out") == {f"a.csv:{number}": "web_address" for number in (3, 4, 5)}
