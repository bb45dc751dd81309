"""verify, index, stats, cat, dedup, filter and join on a small dataset."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.__main__ import main as data_tools
from data_tools.commands import COMMANDS
from data_tools.commands.dedup import near_pairs, perceptual_hash
from data_tools.format.index import Dataset, Strings
from data_tools.format.map_shards import TarReader
from data_tools.io.permutation import Permutation
from data_tools.samples.languages import guess_language
from tests.support.picture_files import contents, encoded, picture, rejects, shard
from tests.support.tiny_models import tiny_tokenizer


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """24 samples in 3 shards: number 20 has the bytes of 0, 21 is 1 made smaller, 22 is 2 as JPEG, 23 is flat."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows = []
    for number in range(24):
        pixels = picture(number, 120 if number % 2 else 100, 80)
        if number in (20, 21, 22):
            pixels = picture(number - 20, 120 if number % 2 else 100, 80)
        if number == 21:
            pixels = np.asarray(Image.fromarray(pixels).resize((60, 40)))
        if number == 23:
            pixels = np.full((80, 120, 3), 7, np.uint8)
        extension = "jpg" if number == 22 else "png"
        (folder / f"{number}.{extension}").write_bytes(encoded(pixels, "JPEG" if number == 22 else "PNG"))
        rows.append([f"{number}.{extension}", f"an image of thing {number % 5}", f"uid{number}", number / 10])
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "uid", "similarity"], *rows])
    out = tmp_path / "data"
    assert shard(folder / "pairs.csv", out, "--shard-size", "8", "--processes", "1") == 0
    return out


def column(dataset: Path, name: str = "uid") -> list[Any]:
    """A column of the .json members, in the order of samples."""
    opened = Dataset.open(dataset)
    found = []
    for number in range(opened.num_shards):
        with TarReader(opened.tar_path(number)) as tar:
            found += [json.loads(tar.read(row, "json"))[name] for row in opened.shard(number)]
    return found


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        data_tools([command, "--help"])
    assert end.value.code == 0 and f"python -m data_tools {command}" in capsys.readouterr().out


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_tools(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert data_tools(["shrad"]) == 2
    assert "no command 'shrad'; did you mean 'shard'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("stats", "D", "--captions", "-1"), "--captions: '-1' is not"),
        (("stats", "D", "--pictures", "-5"), "--pictures: '-5' is not"),
        (("vocabulary", "D", "OUT", "--num-tokens", "0"), "--num-tokens: '0' is not a whole number of 2 or more"),
        (("dedup", "D", "OUT", "--near", "17"), "--near: '17' is not a whole number from 0 to 16"),
        (("filter", "D", "OUT", "--share", "nan"), "--share: 'nan' is not"),
        (("verify", "D", "--processes", "0"), "--processes: '0' is not"),
        (("merge",), "the following arguments are required: OUT"),
    ],
)
def test_values_that_make_no_sense_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    assert data_tools(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("verify", "FILE"), "table.csv: a file; name the folder of a dataset"),
        (("verify", "DATASET/00000.tar"), "00000.tar: a file; name the folder of a dataset"),
        (("merge", "FILE"), "table.csv: a file; name a folder"),
        (("stats", "DATASET", "--out", "FILE"), "table.csv: a file; name a folder"),
        (("cat", "DATASET", "--save", "FILE/deeper"), "table.csv is a file; name a folder"),
        (("vocabulary", "DATASET", "FILE"), "table.csv: a file; name a folder"),
        (("dedup", "DATASET", "FILE"), "table.csv: a file; name a folder"),
        (("glyphs", "FILE"), "table.csv: a file; name a folder"),
        (("merge", "nope://bucket/x"), "nope://bucket/x: unknown protocol nope://"),
        (("verify", "s3://bucket/x"), "s3://bucket/x: this command reads local datasets; copy it first"),
        (("vocabulary", "s3://bucket/x", "OUT"), "s3://bucket/x: this command reads local datasets; copy it first"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "table.csv").write_text("a,b")
    places = [word.replace("DATASET", str(dataset)).replace("FILE", str(tmp_path / "table.csv")) for word in arguments]
    assert data_tools(places) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and "run again to continue" not in error


def test_verify_is_quiet_about_sound_data(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_tools(["verify", str(dataset)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "24 samples in 3 shards: sound" in captured.err


def test_verify_names_every_damage(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Dataset.open(dataset)
    flips = [(0, 2, "image", 40), (0, 5, "json", 0), (1, 3, "text", 1)]
    for shard_number, row, kind, at in flips:
        with open(dataset / f"0000{shard_number}.tar", "r+b") as file:
            file.seek(int(opened.shard(shard_number)[row][f"{kind}_offset"]) + at)
            file.write(b"\xff")
    with open(dataset / "00001.tar", "r+b") as file:
        file.seek(int(opened.shard(1)[6]["image_offset"]) - 512)
        file.write(b"?" * 100)
    (dataset / "00002.tar").unlink()
    assert data_tools(["verify", str(dataset), "--quick", "--processes", "2"]) == 1
    lines = [tuple(line.split("\t")) for line in capsys.readouterr().out.splitlines()]
    keys = [
        f"{number:08d}" for number in Permutation(24, 0)(np.arange(24))
    ]  # the order that seed 0 gives; keys are rows of the input
    assert ("00000.tar", keys[2], "the image's bytes have changed") in lines
    assert ("00000.tar", keys[5], "its .json member is not JSON") in lines
    assert ("00001.tar", keys[11], "its caption is not UTF-8") in lines
    assert any(shard_name == "00001.tar" and "header is damaged" in fault for shard_name, _, fault in lines)
    assert any(line[0] == "00001.tar" and "damaged header in a tar" in line[2] for line in lines)
    assert ("00002.tar", "-", "the tar is missing; fetch or write this shard again") in lines
    assert sum("the tar's digest is" in fault for _, _, fault in lines) == 2 and len(lines) == 8


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (("00001.idx", b""), "00001.idx: not an index (the file is empty); rebuild it"),
        (("00001.idx", b"\x93NUMPY\x01\x00\x01\x00({}"), "00001.idx: not an index (a damaged header: "),
        (("columns/score.npy", b""), "columns/score.npy: not a column (the file is empty); join it again"),
        (("columns/score.npy", None), "columns/score.npy: no such file, but manifest.json names it; join it again"),
    ],
)
def test_empty_and_lost_arrays_are_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: tuple[str, bytes | None], named: str
) -> None:
    np.save(tmp_path / "score.npy", np.arange(24))
    assert data_tools(["join", str(dataset), str(tmp_path / "score.npy")]) == 0
    file, data = damage
    (dataset / file).unlink()
    if data is not None:
        (dataset / file).write_bytes(data)
    assert data_tools(["verify", str(dataset)]) == 1
    assert named in capsys.readouterr().out
    assert data_tools(["cat", str(dataset), "12"]) == 2
    assert named in capsys.readouterr().err


def test_verify_decodes_pictures_of_other_makers(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign").mkdir()
    damaged = bytearray(encoded(picture(0, 200, 200), "JPEG"))
    del damaged[len(damaged) // 2 : len(damaged) // 2 + 50]
    for name, data in (
        ("x.jpg", bytes(damaged)),
        ("x.txt", b"caption"),
        ("y.jpg", encoded(picture(1), "JPEG")),
        ("y.txt", b"y"),
    ):
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "foreign" / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.txt", "y.jpg", "y.txt"):
            tar.add(tmp_path / name, name)
    assert data_tools(["index", str(tmp_path / "foreign")]) == 0
    assert Dataset.open(tmp_path / "foreign").num_samples == 2
    assert data_tools(["verify", str(tmp_path / "foreign")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("a.tar\tx\t") and out.count("\n") == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_member_names_of_other_makers(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: int) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    keys = ["f" * 80 + "/" + "n" * 60 + str(number) for number in range(4)]
    with tarfile.open(folder / "a.tar", "w", format=format) as tar:
        for number, key in enumerate(keys):
            for name, data in ((f"{key}.png", encoded(picture(number % 3))), (f"{key}.txt", b"caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert data_tools(["index", str(folder)]) == 0
    assert data_tools(["verify", str(folder)]) == 0
    assert not capsys.readouterr().out
    (tmp_path / "scores.csv").write_text(
        "key,score\n" + "".join(f"{key},{number}\n" for number, key in enumerate(keys))
    )
    assert data_tools(["join", str(folder), str(tmp_path / "scores.csv"), "--on", "key"]) == 0
    assert np.asarray(Dataset.open(folder).column("score")).tolist() == [0, 1, 2, 3]
    assert data_tools(["dedup", str(folder), str(tmp_path / "unique")]) == 0
    assert json.loads((tmp_path / "unique" / "duplicates.jsonl").read_text()) == {"key": keys[3], "same_as": keys[0]}
    assert data_tools(["cat", str(folder), keys[2]]) == 0
    assert f"{keys[2]}.png" in capsys.readouterr().out


def test_member_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for key in ("café", "thé"):
            for name, data in ((f"{key}.png", encoded(picture(0))), (f"{key}.txt", b"caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert data_tools(["index", str(folder)]) == 0
    assert data_tools(["dedup", str(folder), str(tmp_path / "unique")]) == 0
    line = json.loads((tmp_path / "unique" / "duplicates.jsonl").read_text(encoding="utf-8"))
    assert line == {"key": "th\udce9", "same_as": "caf\udce9"}
    command = [sys.executable, "-m", "data_tools", "cat", str(folder), "0"]
    shown = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, text=True
    )
    assert r"caf\udce9.png" in shown.stdout, shown.stderr


def test_index_of_our_own_tars_is_the_same_index(dataset: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in dataset.glob("*.tar"):
        shutil.copy(path, bare)
    assert data_tools(["index", str(bare), "--processes", "2"]) == 0
    assert [(bare / f"0000{n}.idx").read_bytes() for n in range(3)] == [
        (dataset / f"0000{n}.idx").read_bytes() for n in range(3)
    ]
    assert data_tools(["verify", str(bare)]) == 0


def test_lost_index_is_made_anew_and_the_manifest_stays(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(dataset)
    (dataset / "00001.idx").unlink()
    assert data_tools(["verify", str(dataset)]) == 1
    assert "python -m data_tools index" in capsys.readouterr().out
    assert data_tools(["index", str(dataset)]) == 0
    assert contents(dataset) == before


def test_index_says_what_it_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, data in (
        ("x.jpg", b"<html>"),
        ("x.txt", b"t"),
        ("y.png", encoded(picture(1))),
        ("y.txt", b"t"),
        ("z.txt", b"t"),
    ):
        (tmp_path / name).write_bytes(data)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.txt", "y.png", "y.txt", "z.txt"):
            tar.add(tmp_path / name, name)
    assert data_tools(["index", str(folder)]) == 0
    opened = Dataset.open(folder)
    assert opened.num_samples == 1 and opened.manifest["rejected"] == {"html": 1, "missing_image": 1}
    assert sorted(rejects(folder).values()) == ["html", "missing_image"]
    assert (int(opened.shard(0)[0]["width"]), int(opened.shard(0)[0]["height"])) == (48, 40)


def test_index_of_tars_without_a_sample_and_of_new_ones(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"")
    (folder / "b.tar").write_bytes(b"garbage" * 500)
    assert data_tools(["index", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: no complete sample in 2 tars (" in error and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar", "b.tar", "rejects.jsonl"]
    shutil.copy(dataset / "00000.tar", folder / "c.tar")
    assert data_tools(["index", str(folder)]) == 0
    assert "no complete sample in 2 of 3 tars: a.tar, b.tar; rejects.jsonl says why" in capsys.readouterr().err
    shutil.copy(dataset / "00001.tar", folder / "new.tar")
    assert data_tools(["index", str(folder)]) == 0
    assert (
        "skipped 1 tars that manifest.json does not name: new.tar; to index every tar in the folder, remove"
        in capsys.readouterr().err
    )
    (folder / "d.tar").mkdir()
    assert data_tools(["index", str(folder)]) == 2
    assert "d.tar: a folder with the name of a tar" in capsys.readouterr().err


def test_merge_after_tars_were_changed_and_indexed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(dataset / "00001.tar", "ab") as file:
        file.write(bytes(10240))
    assert data_tools(["index", str(dataset)]) == 0
    assert data_tools(["merge", str(dataset)]) == 2
    error = capsys.readouterr().err
    assert "complete, but its tars were changed and indexed after `shard` wrote them" in error and "--task" not in error


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--where", "similarity >= 2"), set(range(20, 24))),
        (("--where", "similarity > 0.5", "--where", "width == 120"), {7, 9, 11, 13, 15, 17, 19, 23}),
        (("--where", "caption ~ thing 3$"), {3, 8, 13, 18, 23}),
        (("--where", "format != 'png'"), {22}),
        (("--where", "uid == 'uid4'"), {4}),
        (("--best", "similarity", "--share", "0.25"), set(range(18, 24))),
        (("--where", "min_side < 80", "--best", "similarity", "--share", "1"), {21}),
    ],
)
def test_filter(dataset: Path, tmp_path: Path, options: tuple[str, ...], wanted: set[int]) -> None:
    view = tmp_path / "deeper" / "view"
    assert data_tools(["filter", str(dataset), str(view), *options, "--processes", "1"]) == 0
    assert {int(uid[3:]) for uid in column(view)} == wanted
    assert not list(view.glob("*.tar")) and data_tools(["verify", str(view)]) == 0


def test_filter_mistakes(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in [
        ((), "nothing to filter by"),
        (("--where", "width"), "'width' is no condition"),
        (("--where", "nope == 1"), "no sample has 'nope'"),
        (("--where", "width > 'wide'"), "compared with one column, by == or !="),
        (("--where", "width > 9999"), "no sample meets the conditions"),
        (("--best", "similarity"), "--best NAME and --share X go together"),
        (("--where", "caption ~ ("), "is not a valid regular expression"),
    ]:
        assert data_tools(["filter", str(dataset), str(tmp_path / "view"), *options, "--processes", "1"]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert data_tools(["filter", str(dataset), str(dataset), "--where", "width > 1"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_dedup_by_bytes_and_by_looks(dataset: Path, tmp_path: Path) -> None:
    assert data_tools(["dedup", str(dataset), str(tmp_path / "exact")]) == 0
    assert len(set(column(tmp_path / "exact")) & {"uid0", "uid20"}) == 1 and len(column(tmp_path / "exact")) == 23
    assert data_tools(["dedup", str(dataset), str(tmp_path / "near"), "--near", "6", "--processes", "2"]) == 0
    kept = set(column(tmp_path / "near"))
    assert (
        len(kept) == 21
        and "uid1" in kept
        and "uid21" not in kept
        and "uid23" in kept
        and len(kept & {"uid2", "uid22"}) == 1
    )
    lines = [json.loads(line) for line in (tmp_path / "near" / "duplicates.jsonl").read_text().splitlines()]
    assert {"key": "00000021", "same_as": "00000001"} in lines and len(lines) == 3
    assert data_tools(["dedup", str(dataset), str(tmp_path / "caption"), "--same-caption"]) == 0
    assert len(column(tmp_path / "caption")) == 23  # 0 and 20 have the same caption too: thing 0


def test_near_pairs_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    for number in range(0, 100, 2):
        for bit in rng.choice(64, rng.integers(0, 7), replace=False).tolist():
            hashes[number + 1] = hashes[number] ^ np.uint64(1 << bit)
    for distance in (0, 3, 5):
        expected = [
            (i, j)
            for i in range(400)
            for j in range(i + 1, 400)
            if int(np.bitwise_count(hashes[i] ^ hashes[j])) <= distance
        ]
        assert sorted({(min(pair), max(pair)) for pair in near_pairs(hashes, distance)}) == expected


def test_perceptual_hash_survives_scaling_and_compression() -> None:
    source = picture(3, 640, 480)
    whole = perceptual_hash(encoded(source))
    small = perceptual_hash(encoded(Image.fromarray(source).resize((200, 150)), "JPEG", quality=60))
    large = perceptual_hash(encoded(source, "JPEG"))
    other = perceptual_hash(encoded(picture(4, 640, 480)))
    assert whole is not None and small is not None and large is not None and other is not None
    assert (whole ^ small).bit_count() <= 4 and (whole ^ large).bit_count() <= 4 and (whole ^ other).bit_count() > 16
    assert perceptual_hash(encoded(np.full((50, 50, 3), 9, np.uint8))) is None


def test_join_columns_and_arrays(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [number for number in range(24) if number != 5]
    table = pa.table(
        {
            "uid": [f"uid{number}" for number in numbers],
            "score": [number * 0.5 for number in numbers],
            "recaption": [f"neue Bildunterschrift für {number}" for number in numbers],
            "vector": [[float(number), 1.0] for number in numbers],
        }
    )
    pq.write_table(table, tmp_path / "scores.parquet")
    assert data_tools(["join", str(dataset), str(tmp_path / "scores.parquet"), "--on", "uid", "--with", "uid"]) == 0
    assert "joined score, recaption, vector for 23 of 24 samples" in capsys.readouterr().err
    embeddings = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float16)
    np.save(tmp_path / "teacher.npy", embeddings)
    assert data_tools(["join", str(dataset), str(tmp_path / "teacher.npy")]) == 0
    opened = Dataset.open(dataset)
    assert opened.columns == ["recaption", "score", "teacher", "vector"]
    order = [int(uid[3:]) for uid in column(dataset)]
    texts, scores, vectors = opened.column("recaption"), opened.column("score"), opened.column("vector")
    assert isinstance(texts, Strings) and isinstance(scores, np.ndarray) and isinstance(vectors, np.ndarray)
    assert [texts[sample] for sample in range(24)] == [
        "" if n == 5 else f"neue Bildunterschrift für {n}" for n in order
    ]
    assert np.array_equal(scores, [np.nan if n == 5 else n * 0.5 for n in order], equal_nan=True)
    assert vectors.shape == (24, 2) and np.array_equal(
        vectors[:, 0], [np.nan if n == 5 else n for n in order], equal_nan=True
    )
    assert np.array_equal(np.asarray(opened.column("teacher")), embeddings)
    # a view keeps the columns of its samples
    assert data_tools(["filter", str(dataset), str(tmp_path / "view"), "--where", "score >= 10"]) == 0
    view = Dataset.open(tmp_path / "view")
    view_texts = view.column("recaption")
    assert [view_texts[sample] for sample in range(4)] == [
        f"neue Bildunterschrift für {uid[3:]}" for uid in column(tmp_path / "view")
    ]
    kept = [place for place, number in enumerate(order) if number >= 20]
    assert np.array_equal(np.asarray(view.column("teacher")), embeddings[kept])
    assert data_tools(["verify", str(dataset)]) == 0


def test_join_mistakes(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("uid,score\nelse,1\n")
    (tmp_path / "twice.csv").write_text("uid,score,score\nelse,1,2\n")
    (tmp_path / "return.csv").write_bytes(b"uid,words\nuid1,one\nuid2,hello\rworld\n")
    (tmp_path / "many.csv").write_text("uid,score\nuid1,1\nuid2,2,3\n")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "short.npy", np.zeros((3, 2)))
    for arguments, expected in [
        (("a.csv", "--on", "nope"), "no column 'nope'"),
        (("a.csv",), "which column identifies the sample? Add --on COLUMN; there are: uid, score"),
        (("twice.csv", "--on", "uid"), "twice.csv: 2 columns are called 'score'"),
        (("a.csv", "--on", "uid"), "no value of 'uid' is the 'key' of a sample"),
        (("return.csv", "--on", "uid", "--with", "uid"), "return.csv: line 3 is not readable"),
        (("many.csv", "--on", "uid", "--with", "uid"), "many.csv: line 3 has more fields than the header has names"),
        (("short.npy",), "shape (3, 2), but the dataset has 24 samples"),
        (("missing.csv", "--on", "uid"), "no such file"),
        (("empty.npy", "--name", "e"), "empty.npy: not a .npy file (the file is empty)"),
    ]:
        assert data_tools(["join", str(dataset), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        assert expected in capsys.readouterr().err


def test_join_reads_long_fields(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"uid,words\nuid3,{'long ' * 60_000}\n")
    assert data_tools(["join", str(dataset), str(tmp_path / "long.csv"), "--on", "uid", "--with", "uid"]) == 0
    words = Dataset.open(dataset).column("words")
    assert sorted({len(words[sample]) for sample in range(24)}) == [0, 300_000]


def test_cat(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_tools(["cat", str(dataset)]) == 0
    assert capsys.readouterr().out.count("caption  an image of thing") == 3
    assert data_tools(["cat", str(dataset), "00000022", "--show", "--save", str(tmp_path / "saved")]) == 0
    out = capsys.readouterr().out
    assert "00000022.jpg  100 x 80" in out and "uid22" in out and "\x1b[48;2;" in out
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "00000022.jpg",
        "00000022.json",
        "00000022.txt",
    ]
    assert data_tools(["cat", str(dataset), "24"]) == 2 and data_tools(["cat", str(dataset), "99999999"]) == 2
    assert data_tools(["cat", str(tmp_path)]) == 2
    assert "finish `python -m data_tools shard`" in capsys.readouterr().err


def test_stats_count_the_captions_that_a_model_would_cut(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for num_tokens, cut in ((5, 1.0), (6, 0.0)):  # five words and the end token
        out = ["--out", str(tmp_path), "--pictures", "0", "--num-tokens", str(num_tokens)]
        assert data_tools(["stats", str(dataset), *out, "--tokenizer", tiny_tokenizer()]) == 0
        captions = json.loads((tmp_path / "stats.json").read_text())["captions"]
        assert captions["tokens"]["mean"] == 6 and captions["cut"] == cut
        assert f"{cut:.1%} of captions have more than {num_tokens} tokens" in capsys.readouterr().err
    assert data_tools(["stats", str(dataset), *out, "--tokenizer", str(tmp_path / "stats.json")]) == 2
    assert "not readable as a tokenizer.json" in capsys.readouterr().err


def test_stats(dataset: Path, tmp_path: Path) -> None:
    assert data_tools(["stats", str(dataset), "--out", str(tmp_path / "report"), "--pictures", "5"]) == 0
    figures = json.loads((tmp_path / "report" / "stats.json").read_text())
    assert figures["samples"] == 24 and figures["formats"] == {"png": 23, "jpg": 1}
    assert figures["duplicate_pictures"] == {"groups": 1, "extra": 1}
    assert figures["captions"]["looked_at"] == 24 and figures["captions"]["languages"] == {"english": 24}
    assert figures["captions"]["repeated_extra"] == 19 and sum(figures["width"]["counts"]) == 24
    assert figures["height"]["quantiles"]["0"] == 40 and figures["height"]["quantiles"]["1"] == 80
    page = (tmp_path / "report" / "stats.html").read_text()
    assert (
        page.count("<img") == 5 and "http://" not in page and "https://" not in page and page.count("<svg") == 4
    )  # two figures are the same for all samples


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a dog on the beach", "english"),
        ("ein Hund mit einem Ball auf der Wiese", "german"),
        ("un chien sur la plage avec une balle", "french"),
        ("собака на пляже", "cyrillic"),
        ("海辺の犬", "japanese"),
        ("海滩上的狗", "chinese"),
        ("IMG_1234", "latin, unclear"),
        ("1234 !", "no letters"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert guess_language(text) == language
