"""Every input that `shard` reads, with its own kind of bad rows."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main as data_tools
from data_tools.format.index import Dataset
from tests.support.picture_files import COLUMNS, encoded, picture, rejects, shard
from tests.test_data_tools_shard import read_all


def captions(out: Path) -> list[str]:
    return sorted(sample["txt"].decode() for sample in read_all(out))


def metas(out: Path) -> list[dict[str, Any]]:
    """The .json members, by key."""
    return [json.loads(sample["json"]) for sample in sorted(read_all(out), key=lambda sample: sample["key"])]


def pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))


def test_csv_with_everything_that_goes_wrong(tmp_path: Path) -> None:
    pictures(tmp_path, 9)
    lines = [
        b"\xef\xbb\xbfimage,caption,note",
        b'0.png,"two\nlines, and a comma",x',
        b"",
        b'1.png,"say ""hi""",y',
        b"2.png,too few",
        b"3.png,too,many,fields",
        b"4.png,\xff\xfe not utf-8,z",
        b"5.png,,z",
        b"missing.png,a,z",
        b",no picture,z",
        b'6.png," \x00 ",z',
        "7.png,שלום 👋 naïve,z".encode(),
        b"../outside.png,a,z",
        b"8.png,last,z",
    ]
    (tmp_path / "pairs.csv").write_bytes(b"\r\n".join(lines[:4]) + b"\n" + b"\n".join(lines[4:]))
    assert shard(tmp_path / "pairs.csv", tmp_path / "out", "--max-rejected", "1") == 0
    assert captions(tmp_path / "out") == sorted(["two lines, and a comma", 'say "hi"', "שלום 👋 naïve", "last"])
    assert rejects(tmp_path / "out") == {
        "pairs.csv:6": "wrong_fields",
        "pairs.csv:7": "wrong_fields",
        "pairs.csv:8": "not_utf8",
        "pairs.csv:9": "caption_empty",
        "pairs.csv:10": "file_missing",
        "pairs.csv:11": "image_missing",
        "pairs.csv:12": "caption_empty",
        "pairs.csv:14": "file_missing",
    }
    assert metas(tmp_path / "out")[0]["note"] == "x"


def test_tsv_without_header_and_with_quotes_as_letters(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    (tmp_path / "pairs.tsv").write_text('a 5" pipe\t0.png\n"an open quote\t1.png\nplain\t2.png')
    assert shard(tmp_path / "pairs.tsv", tmp_path / "out", "--columns", "caption,image", "--no-quotes") == 0
    assert captions(tmp_path / "out") == ['"an open quote', 'a 5" pipe', "plain"]


def test_an_open_quote_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.csv").write_text(
        "image,caption\n" + "0.png,fine\n" * 5 + '1.png,"open\n' + "0.png,swallowed\n" * 12_000
    )
    assert shard(tmp_path / "pairs.csv", tmp_path / "out") == 2
    assert "a quote opened on line 7 is not closed" in capsys.readouterr().err


@pytest.mark.parametrize("quoted", [True, False])
def test_carriage_returns_and_other_odd_bytes_cost_their_own_row(tmp_path: Path, quoted: bool) -> None:
    """With quotes anywhere in the file rows are found by another way."""
    pictures(tmp_path, 6)
    lines = [
        b"image,caption",
        b'0.png,"first"' if quoted else b"0.png,first",
        b"1.png,hello\rworld",
        b"2.png,nul \x00 inside",
        b"3.png,ends in two\r\r",
        b"4.png," + b"long " * 60_000,
        b'5.png,"over\ntwo" lines\rand more' if quoted else b"5.png,another\rone",
        b"0.png,last",
    ]
    (tmp_path / "pairs.csv").write_bytes(b"\n".join(lines))
    assert shard(tmp_path / "pairs.csv", tmp_path / "out", "--max-rejected", "1") == 0
    assert rejects(tmp_path / "out") == {"pairs.csv:3": "row_malformed", "pairs.csv:7": "row_malformed"}
    assert [caption[:11] for caption in captions(tmp_path / "out")] == [
        "ends in two",
        "first",
        "last",
        "long long l",
        "nul inside",
    ]


def test_a_header_that_is_not_csv_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"image,caption\r0.png,one\r1.png,two\r")
    assert shard(tmp_path / "pairs.csv", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "pairs.csv: line 1, the header" in error and r"tr '\r' '\n'" in error and error.count("\n") == 1


def test_utf16_and_empty_tables_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_bytes("image,caption\n".encode("utf-16"))
    (tmp_path / "b.csv").write_bytes(b"")
    (tmp_path / "c.csv").write_bytes(b"image,caption\n")
    (tmp_path / "d.csv").write_bytes(b"image,caption,caption,,\n0.png,a,b,,\n")
    for name, expected in (
        ("a", "a.csv: a header line and no rows below it"),
        ("b", "the file is empty"),
        ("c", "c.csv: a header line and no rows below it"),
        ("d", "2 columns are called 'caption'"),
    ):
        assert shard(tmp_path / f"{name}.csv", tmp_path / "out") == 2
        assert expected in capsys.readouterr().err


def test_jsonl_with_several_captions(tmp_path: Path) -> None:
    pictures(tmp_path / "p", 3)
    rows = [
        {
            "image": "0.png",
            "caption": ["one", "two", "one"],
            "alt": "three",
            "score": 0.5,
            "sample": "mine",
            "tags": ["a", {"b": None}],
        },
        {"image": "1.png", "caption": None, "alt": "only alt"},
        {"image": "2.png", "caption": None, "alt": None},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken", "[1]", ""]))
    columns = (*COLUMNS, "--caption", "alt", "--images", str(tmp_path / "p"))
    assert shard(tmp_path / "pairs.jsonl", tmp_path / "out", "--max-rejected", "1", columns=columns) == 0
    meta = metas(tmp_path / "out")
    assert (
        meta[0]["captions"] == ["one", "two", "three"]
        and meta[0]["column_sample"] == "mine"
        and meta[0]["tags"] == ["a", {"b": None}]
    )
    assert "captions" not in meta[1] and captions(tmp_path / "out") == ["one", "only alt"]
    assert Dataset.open(tmp_path / "out").max_captions == 3
    assert sorted(rejects(tmp_path / "out").values()) == ["caption_missing", "not_json", "row_malformed"]


@pytest.mark.parametrize("shard_size", [7, 100])
def test_parquet_by_row_group(tmp_path: Path, shard_size: int) -> None:
    (tmp_path / "in").mkdir()
    for file in range(2):
        numbers = list(range(file * 20, file * 20 + 20))
        table = pa.table(
            {
                "image": [encoded(picture(number)) for number in numbers],
                "caption": [[f"caption {number}"] for number in numbers],
                "number": numbers,
                "thumb": [b"bytes"] * 20,
            }
        )
        pq.write_table(table, tmp_path / "in" / f"{file}.parquet", row_group_size=5)
    assert shard(tmp_path / "in", tmp_path / "out", "--shard-size", str(shard_size)) == 0
    meta = metas(tmp_path / "out")
    assert [entry["number"] for entry in meta] == list(range(40)) and "thumb" not in meta[0]
    assert meta[7]["sample"]["source"] == "0.parquet:7" and meta[27]["sample"]["source"] == "1.parquet:7"
    by_key = sorted(read_all(tmp_path / "out"), key=lambda sample: sample["key"])
    assert [sample["png"] for sample in by_key] == [encoded(picture(number)) for number in range(40)]
    order = [int(sample["key"]) for sample in read_all(tmp_path / "out")]
    # a shard of 7 rows takes whole row groups, two of them at a time; the larger one mixes all
    assert order != sorted(order) and (shard_size > 40 or len({number // 5 for number in order[:7]}) == 2)


def test_damaged_parquet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not it")
    assert shard(tmp_path / "a.parquet", tmp_path / "out") == 2
    assert "a.parquet: not readable" in capsys.readouterr().err
    pq.write_table(pa.table({"image": ["a.png"], "caption": ["a"], "otherX": ["b"]}), tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content.replace(b"otherX", b"other\xff"))
    assert shard(tmp_path / "b.parquet", tmp_path / "out") == 2
    assert "b.parquet: not readable" in capsys.readouterr().err


def save_to_disk(folder: Path, rows: int) -> None:
    """What Dataset.save_to_disk of Hugging Face datasets writes."""
    folder.mkdir(parents=True)
    names = []
    for number in range(2):
        part = range(number * rows // 2, (number + 1) * rows // 2)
        image = [{"bytes": encoded(picture(row)), "path": None} for row in part]
        table = pa.table({"image": image, "caption": [f"caption {row}" for row in part], "label": list(part)})
        names.append({"filename": f"data-{number:05d}-of-00002.arrow"})
        with (
            pa.OSFile(str(folder / names[-1]["filename"]), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": names, "_fingerprint": "abc", "_indices_data_files": None})
    )
    (folder / "dataset_info.json").write_text("{}")


def test_hugging_face_dataset_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_to_disk(tmp_path / "in" / "train", 20)
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert shard(tmp_path / "in", tmp_path / "out") == 2
    assert "holds several splits (train); name one" in capsys.readouterr().err
    assert shard(tmp_path / "in" / "train", tmp_path / "out", "--processes", "2", "--shard-size", "6") == 0
    assert [entry["label"] for entry in metas(tmp_path / "out")] == list(range(20))
    state = tmp_path / "in" / "train" / "state.json"
    state.write_text(state.read_text().replace("null", '[{"filename": "x"}]'))
    assert shard(tmp_path / "in" / "train", tmp_path / "out2") == 2
    assert "flatten_indices" in capsys.readouterr().err


def test_a_real_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [encoded(picture(row)) for row in range(10)], "caption": [f"caption {row}" for row in range(10)]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(str(tmp_path / "in"))
    assert shard(tmp_path / "in", tmp_path / "out") == 0
    assert captions(tmp_path / "out") == [f"caption {row}" for row in range(10)]


def test_folder_with_txt_and_json(tmp_path: Path) -> None:
    pictures(tmp_path / "in" / "deep", 5)
    deep = tmp_path / "in" / "deep"
    (deep / "0.txt").write_text("from txt\n")
    (deep / "1.json").write_text('{"caption": "from json", "tag": 7}')
    (deep / "2.txt").write_text("both")
    (deep / "2.json").write_text('{"tag": 8}')
    (deep / "3.json").write_text("{broken")
    (deep / "5.png").write_bytes(encoded(picture(5)))
    (deep / "5.txt").write_bytes("Café".encode("latin-1"))
    (deep / "9.txt").write_text("orphan")
    (deep / "._0.png").write_bytes(b"mac")
    assert shard(tmp_path / "in", tmp_path / "out", "--max-rejected", "1", columns=()) == 0
    assert captions(tmp_path / "out") == ["both", "from json", "from txt"]
    assert [entry.get("tag") for entry in metas(tmp_path / "out")] == [None, 7, 8]
    expected = {
        "deep/9.txt": "missing_image",
        "deep/3.png": "not_json",
        "deep/4.png": "caption_missing",
        "deep/5.png": "not_utf8",
    }
    assert rejects(tmp_path / "out") == expected


def test_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "images", 3)
    tree = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
        "annotations": [{"image_id": number % 2, "caption": f"caption {number}"} for number in range(4)]
        + [{"image_id": 99, "caption": "x"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(tree))
    assert shard(tmp_path / "captions.json", tmp_path / "out", "--images", str(tmp_path / "images"), columns=()) == 0
    meta = metas(tmp_path / "out")
    assert [entry["captions"] for entry in meta] == [["caption 0", "caption 2"], ["caption 1", "caption 3"]]
    assert rejects(tmp_path / "out") == {
        "captions.json: image_id 2": "caption_missing",
        "captions.json: image_id 99": "missing_image",
    }
    (tmp_path / "list.json").write_text("[]")
    assert shard(tmp_path / "list.json", tmp_path / "out2", columns=()) == 2
    assert "not COCO captions" in capsys.readouterr().err


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            meta = json.dumps({"key": f"{number}", "status": "success", "caption": f"caption {number}"}).encode()
            for extension, data in (
                ("png", encoded(picture(number))),
                ("txt", f"caption {number}".encode()),
                ("json", meta),
            ):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_tars_of_img2dataset_are_sharded_again(tmp_path: Path) -> None:
    """img2dataset writes NNNNN.tar, NNNNN.parquet and NNNNN_stats.json."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_tar(tmp_path / "in" / f"{number:05d}.tar", range(number * 10, number * 10 + 10))
        (tmp_path / "in" / f"{number:05d}.parquet").write_bytes(b"")
        (tmp_path / "in" / f"{number:05d}_stats.json").write_text("{}")
    raw = (tmp_path / "in" / "00001.tar").read_bytes()
    with tarfile.open(tmp_path / "in" / "00001.tar") as tar:
        (tmp_path / "in" / "00001.tar").write_bytes(raw[: tar.getmember("000000015.png").offset])
    assert shard(tmp_path / "in", tmp_path / "out", "--shard-size", "8", "--processes", "2", columns=()) == 0
    assert captions(tmp_path / "out") == sorted(f"caption {number}" for number in [*range(15), *range(20, 30)])
    assert list(rejects(tmp_path / "out").values()) == ["no_end_marker"]
    # once more: our own output is an input too, and keeps its captions
    assert shard(tmp_path / "out", tmp_path / "again", "--caption", "caption", columns=()) == 0
    assert captions(tmp_path / "again") == captions(tmp_path / "out")
    assert metas(tmp_path / "again")[0]["status"] == "success"


def test_rejects_of_tars_name_long_keys_in_full(tmp_path: Path) -> None:
    keys = ["f" * 90 + "/" + "n" * 60 + str(number) for number in range(2)]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, picture_bytes in ((keys[0], encoded(picture(0))), (keys[1], b"no picture")):
            for name, data in ((f"{key}.png", picture_bytes), (f"{key}.txt", b"caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert shard(tmp_path / "a.tar", tmp_path / "out", "--max-rejected", "1", columns=()) == 0
    assert list(rejects(tmp_path / "out")) == [f"a.tar:{keys[1]}"]


def test_files_of_img2dataset(tmp_path: Path) -> None:
    pictures(tmp_path / "in" / "00000", 2)
    for number in range(2):
        (tmp_path / "in" / "00000" / f"{number}.txt").write_text(f"caption {number}")
    (tmp_path / "in" / "00000.parquet").write_bytes(b"")
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    assert shard(tmp_path / "in", tmp_path / "out", columns=()) == 0
    assert captions(tmp_path / "out") == ["caption 0", "caption 1"] and not rejects(tmp_path / "out")


def test_several_captions_survive_sharding_again(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "0.png", "caption": ["one", "two"]}))
    assert shard(tmp_path / "pairs.jsonl", tmp_path / "out") == 0
    assert shard(tmp_path / "out", tmp_path / "again", columns=()) == 0
    assert metas(tmp_path / "again")[0]["captions"] == ["one", "two"]


def test_pictures_by_url(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://pictures/0.png", "wb") as file:
        file.write(encoded(picture(0)))
    (tmp_path / "pairs.csv").write_text(
        "image,caption\nmemory://pictures/0.png,by url\n0.png,by root\nmemory://pictures/9.png,gone\n"
    )
    assert shard(tmp_path / "pairs.csv", tmp_path / "out", "--images", "memory://pictures", "--processes", "1") == 0
    assert captions(tmp_path / "out") == ["by root", "by url"] and rejects(tmp_path / "out") == {
        "pairs.csv:4": "file_missing"
    }


def test_pictures_of_a_backend_that_is_not_installed_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "uninstalled", {"class": "nothere.FileSystem", "err": "Install nothere"})
    for pictures, options in (("uninstalled://b/0.png", ()), ("0.png", ("--images", "uninstalled://b"))):
        (tmp_path / "pairs.csv").write_text(f"image,caption\n{pictures},a\n")
        assert shard(tmp_path / "pairs.csv", tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert "is not installed (Install nothere): pip install nothere" in error and error.count("\n") == 1


def test_large_and_unreadable_files(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(encoded(picture(1)) + bytes(100_000))
    (tmp_path / "pairs.csv").write_text("image,caption\n0.png,a\n1.png,b\n.,a folder\n")
    assert shard(tmp_path / "pairs.csv", tmp_path / "out", "--max-bytes", "50000", "--max-rejected", "1") == 0
    assert rejects(tmp_path / "out") == {"pairs.csv:3": "file_too_large", "pairs.csv:4": "file_unreadable"}


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("dir.csv", (), "dir.csv: no images in it, nor in the folders below"),
        (
            "tables",
            (),
            "tables: no images in it, nor in the folders below; it holds tables, name one of them: a.csv, b.csv",
        ),
        ("tables", ("--input", "csv", *COLUMNS), "tables: a folder; name the csv file in it"),
        (
            "tables/a.csv",
            ("--input", "tars"),
            "a.csv: no complete sample in it: an image with KEY.txt or KEY.json; the first of what is wrong",
        ),
        ("tables/a.csv", ("--input", "folder"), "a.csv: a file, not a folder of images"),
        ("empty.jsonl", COLUMNS, "empty.jsonl: no line with anything in it"),
        (
            "imgs",
            (),
            "imgs: no image has a caption beside it, as NAME.txt or NAME.json; if a table has them, name the table",
        ),
        ("imgs", COLUMNS, "imgs: --image names a column of a table, but this is a folder of images; remove it"),
        ("texts", ("--caption", "caption"), "texts: --caption names a key of NAME.json, and there is none"),
        ("tars", (), "d.tar: a folder among the tars; rename it"),
    ],
)
def test_inputs_of_another_kind_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, options: tuple[str, ...], expected: str
) -> None:
    for folder in ("dir.csv", "tables", "tars/d.tar"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a.csv", "b.csv"):
        (tmp_path / "tables" / name).write_text("image,caption\n0.png,one\n")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    pictures(tmp_path / "imgs", 2)
    pictures(tmp_path / "texts", 1)
    (tmp_path / "texts" / "0.txt").write_text("caption")
    assert data_tools(["shard", str(tmp_path / source), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and str(tmp_path) in error and error.count("\n") == 1


def test_unknown_kinds_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.xlsx").write_bytes(b"PK")
    assert data_tools(["shard", str(tmp_path / "pairs.xlsx"), str(tmp_path / "out")]) == 2
    assert "a spreadsheet; save it as CSV" in capsys.readouterr().err
    (tmp_path / "pairs.xml").write_bytes(b"<")
    assert data_tools(["shard", str(tmp_path / "pairs.xml"), str(tmp_path / "out")]) == 2
    assert "add --input csv|tsv|jsonl" in capsys.readouterr().err
