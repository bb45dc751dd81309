"""Side-car columns when a manifest is written anew: kept while they are true, named with the remedy when they are
not."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.__main__ import main as data_tools
from data_tools.format.columns import amended_columns
from data_tools.format.fields import values_of
from data_tools.format.index import Dataset
from data_tools.io.output import Output
from tests.support.picture_files import contents, encoded, picture, shard, write_pairs

ROWS = 50
VALUES = np.arange(2 * ROWS, dtype=np.float16).reshape(ROWS, 2)
REMEDY = "add them again with `python -m data_tools join` or `python -m trainer.embed`"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "in", ROWS)


@pytest.fixture
def dataset(pairs: Path, tmp_path: Path) -> Path:
    """Three shards with a column of numbers and one of texts beside them."""
    out = tmp_path / "out"
    assert again(pairs, out) == 0
    np.save(tmp_path / "teacher.npy", VALUES)
    assert data_tools(["join", str(out), str(tmp_path / "teacher.npy")]) == 0
    (tmp_path / "words.jsonl").write_text(
        "".join(f'{{"uid": "{number}", "words": "number {number}"}}\n' for number in range(ROWS))
    )
    assert data_tools(["join", str(out), str(tmp_path / "words.jsonl"), "--on", "uid", "--with", "number"]) == 0
    return out


def again(pairs: Path, out: Path, *options: str) -> int:
    return shard(pairs, out, "--shard-size", "20", "--processes", "1", *options)


def rewrite(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """The tar anew, with other members."""
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_doing_it_again_keeps_everything(pairs: Path, dataset: Path) -> None:
    before = contents(dataset)
    for command in ("merge", "index"):
        assert data_tools([command, str(dataset)]) == 0
        assert contents(dataset) == before
    assert again(pairs, dataset) == 0
    assert contents(dataset) == before


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_shard_written_again_keeps_them(pairs: Path, dataset: Path, tasks: int) -> None:
    before = contents(dataset)
    (dataset / "00001.tar").unlink()
    for task in range(tasks):
        assert again(pairs, dataset, "--task", f"{task}/{tasks}") == 0
    assert data_tools(["merge", str(dataset)]) == 0
    assert contents(dataset) == before


def test_a_column_joined_while_another_is_being_read_stays(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late.csv").write_text("uid,late\n" + "".join(f"{number},{number}\n" for number in range(ROWS)))
    meanwhile = [["join", str(dataset), str(tmp_path / "teacher.npy"), "--name", "meanwhile"]]

    def values(*arguments: Any) -> Any:
        found = values_of(*arguments)
        while meanwhile:
            assert data_tools(meanwhile.pop()) == 0
        return found

    monkeypatch.setattr("data_tools.commands.join.values_of", values)
    late = ["join", str(dataset), str(tmp_path / "late.csv"), "--on", "uid", "--with", "number"]
    assert data_tools(late) == 0
    assert Dataset.open(dataset).columns == ["late", "meanwhile", "teacher", "words"]
    # a dataset that became another is not given the columns of what it was
    rewrite(dataset / "00000.tar", lambda members: dict(list(members.items())[:-3]))
    meanwhile.append(["index", str(dataset)])
    assert data_tools(late) == 2
    assert "its shards were changed during this run; run again" in capsys.readouterr().err


def test_joins_at_the_same_time_lose_nothing(dataset: Path, tmp_path: Path) -> None:
    names = [f"column{number}" for number in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        ended = pool.map(
            lambda name: data_tools(["join", str(dataset), str(tmp_path / "teacher.npy"), "--name", name]), names
        )
        assert list(ended) == [0] * len(names)
    opened = Dataset.open(dataset)
    assert opened.columns == [*names, "teacher", "words"]
    assert all(np.array_equal(np.asarray(opened.column(name)), VALUES) for name in names)
    assert not (dataset / ".parts").exists()


def test_join_waits_for_another_process_that_adds_a_column(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """``trainer.embed`` adds its column in the same block."""
    opened = Dataset.open(dataset)
    with ThreadPoolExecutor(1) as pool, amended_columns(opened) as entries:
        joining = pool.submit(data_tools, ["join", str(dataset), str(tmp_path / "teacher.npy"), "--name", "joined"])
        said = ""
        while "waiting for another process that is adding columns" not in said:
            assert not joining.done(), said
            time.sleep(0.05)
            said += capfd.readouterr().err
        entries["embedded"] = opened.manifest["columns"]["teacher"]
    assert joining.result(timeout=60) == 0
    assert Dataset.open(dataset).columns == ["embedded", "joined", "teacher", "words"]


def test_a_shard_that_came_out_different_loses_them_with_a_line(
    pairs: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "00001.tar").unlink()
    for number in range(ROWS):  # the table is the same, the images are not
        (pairs.parent / f"{number}.jpeg").write_bytes(encoded(picture(number + 1000), "JPEG"))
    assert again(pairs, dataset) == 0
    said = capsys.readouterr().err
    assert f"the shards have changed, so these columns are dropped: teacher, words; {REMEDY}\n" in said
    assert Dataset.open(dataset).columns == []


def test_index_keeps_them_where_only_other_members_changed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    rewrite(
        dataset / "00000.tar",
        lambda members: {name: b"mended" if name.endswith(".txt") else data for name, data in members.items()},
    )
    before = json.loads((dataset / "manifest.json").read_text())
    assert data_tools(["index", str(dataset)]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    opened = Dataset.open(dataset)
    assert opened.manifest["shards"] != before["shards"] and opened.manifest["columns"] == before["columns"]
    assert np.array_equal(np.asarray(opened.column("teacher")), VALUES)


def test_index_leaves_out_embeddings_of_captions_that_may_have_changed(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    columns = manifest["columns"]
    columns |= {"of_text": columns["teacher"] | {"side": "text"}, "of_text.scale": columns["teacher"]}
    columns["of_image"] = columns["teacher"] | {"side": "image"}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    rewrite(
        dataset / "00002.tar",
        lambda members: {name: b"mended" if name.endswith(".txt") else data for name, data in members.items()},
    )
    assert data_tools(["index", str(dataset)]) == 0
    assert f"possibly their captions, so these columns are dropped: of_text; {REMEDY}" in capsys.readouterr().err
    assert Dataset.open(dataset).columns == ["of_image", "teacher", "words"]


@pytest.mark.parametrize("what", ["fewer", "another order", "another image", "another key", "index lost"])
def test_index_names_those_that_samples_no_longer_fit(
    dataset: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        names = list(members)
        if what == "fewer":
            return {name: members[name] for name in names[3:]}
        if what == "another order":
            return {name: members[name] for name in names[3:] + names[:3]}
        if what == "another image":
            return members | {names[0]: encoded(picture(77), "JPEG")}
        if what == "another key":
            return {name.replace(names[0][:8], "99999999"): data for name, data in members.items()}
        return members | {names[1]: b"mended"}

    rewrite(dataset / "00001.tar", change)
    if what == "index lost":
        (dataset / "00001.idx").unlink()
    capsys.readouterr()
    assert data_tools(["index", str(dataset)]) == 0
    said = capsys.readouterr().err
    assert f"{dataset}: the samples have changed, so these columns are dropped: teacher, words; {REMEDY}\n" in said
    assert Dataset.open(dataset).columns == [] and (dataset / "columns" / "teacher.npy").exists()


def test_a_killed_index_does_not_take_its_own_rows_for_the_old_ones(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samples have changed places, so that every count is what it was."""

    def swapped(members: dict[str, bytes]) -> dict[str, bytes]:
        names = list(members)
        return {name: members[name] for name in names[3:6] + names[:3] + names[6:]}

    rewrite(dataset / "00000.tar", swapped)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert data_tools(["index", str(dataset)]) != 0
    assert Dataset.open(dataset).columns == ["teacher", "words"]
    assert data_tools(["index", str(dataset)]) == 0
    assert Dataset.open(dataset).columns == []


def test_columns_that_no_manifest_names_are_not_passed_over_in_silence(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "manifest.json").unlink()
    capsys.readouterr()
    assert data_tools(["index", str(dataset)]) == 0
    said = capsys.readouterr().err
    assert (
        "no manifest names the files in columns/, so these columns are dropped: teacher.npy, words.npy, "
        "words.text.npy; add" in said
    )
    assert Dataset.open(dataset).columns == []
