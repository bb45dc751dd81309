"""The command `shard`: bytes that depend on the plan alone, runs that survive anything, and rows that are never lost
without a word."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import webdataset
from fsspec.registry import known_implementations
from PIL import Image

from data_tools.__main__ import main as data_tools
from data_tools.format.index import Dataset
from data_tools.format.scan import hash_key, read_key, scan_tar
from data_tools.format.tar_reader import TarProblem, walk
from data_tools.io import output
from data_tools.io.output import Output
from data_tools.sharding import plan
from data_tools.sharding.counts import Tally
from data_tools.sharding.progress import ShardProgress
from tests.support.picture_files import COLUMNS, contents, encoded, picture, rejects, shard, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 130)


@pytest.fixture(scope="module")
def reference(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert shard(pairs, out, "--shard-size", "20", "--processes", "1") == 0
    return out


def read_all(out: Path) -> list[dict[str, bytes]]:
    """All samples as Python's tarfile sees them: key and extension -> bytes."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                samples.setdefault(key, {"key": key.encode()})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return list(samples.values())


def test_tars_index_and_manifest_agree(pairs: Path, reference: Path) -> None:
    dataset = Dataset.open(reference)
    assert dataset.num_samples == 130 and dataset.num_shards == 7
    assert sorted(path.name for path in reference.iterdir())[-3:] == ["manifest.json", "plan.json", "rejects.jsonl"]
    for number in range(dataset.num_shards):
        rows, problems = scan_tar(dataset.tar_path(number))
        mine = dataset.shard(number)
        assert not problems
        for name in mine.dtype.names or ():
            if name not in ("width", "height"):
                assert np.array_equal(mine[name], rows[name]), name
        assert set(mine["width"].tolist()) == {48} and set(mine["height"].tolist()) == {40}


def test_every_row_is_there_once_with_its_own_picture(pairs: Path, reference: Path) -> None:
    samples = read_all(reference)
    order = [json.loads(sample["json"])["number"] for sample in samples]
    assert sorted(order, key=int) == [str(number) for number in range(130)] and order != sorted(order, key=int)
    for sample in samples:
        meta = json.loads(sample["json"])
        assert sample["jpg"] == (pairs.parent / f"{meta['number']}.jpeg").read_bytes()
        assert sample["txt"].decode() == f"image number {meta['number']}, drawn"
        assert meta["sample"]["source"] == f"pairs.csv:{int(meta['number']) + 2}" and int(sample["key"]) == int(
            meta["number"]
        )


def test_locate(reference: Path) -> None:
    dataset = Dataset.open(reference)
    shards, rows = dataset.locate(np.array([0, 19, 20, 129]))
    assert shards.tolist() == [0, 0, 1, 6] and rows.tolist() == [0, 19, 0, 9]
    with pytest.raises(IndexError):
        dataset.locate(np.array([130]))
    with open(dataset.tar_path(1), "rb") as tar:
        assert hash_key(read_key(tar.fileno(), dataset.shard(1)[0])) == int(dataset.shard(1)[0]["key_hash"])


@pytest.mark.parametrize("processes", ["2", "5"])
def test_any_number_of_processes_writes_the_same(pairs: Path, reference: Path, tmp_path: Path, processes: str) -> None:
    assert shard(pairs, tmp_path, "--shard-size", "20", "--processes", processes) == 0
    assert contents(tmp_path) == contents(reference)


def test_tasks_and_merge_write_the_same(
    pairs: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in (2, 0):
        assert shard(pairs, tmp_path, "--shard-size", "20", "--processes", "1", "--task", f"{task}/3") == 0
    assert not (tmp_path / "manifest.json").exists()
    assert data_tools(["merge", str(tmp_path)]) == 2
    assert "2 of 7 shards are missing (00001.tar, 00004.tar)" in capsys.readouterr().err
    assert shard(pairs, tmp_path, "--shard-size", "20", "--processes", "1", "--task", "1/3") == 0
    assert data_tools(["merge", str(tmp_path)]) == 0
    assert contents(tmp_path) == contents(reference)


@pytest.mark.slow
def test_ray_tasks_write_the_same(pairs: Path, reference: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray runs this on a one-node cluster")
    assert shard(pairs, tmp_path / "out", "--shard-size", "20", "--ray", "3") == 0
    assert contents(tmp_path / "out") == contents(reference)


def test_a_second_run_changes_nothing(pairs: Path, reference: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    assert shard(pairs, reference, "--shard-size", "20") == 0
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--shard-size", "30"), "shard_size=20 (now 30)"), (("--shard-size", "20", "--seed", "1"), "seed=0 (now 1)")],
)
def test_other_options_are_refused(
    pairs: Path, reference: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], named: str
) -> None:
    before = contents(reference)
    assert shard(pairs, reference, *options) == 2
    assert named in capsys.readouterr().err and contents(reference) == before


def test_another_input_is_refused(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(write_pairs(tmp_path / "other", 130, "PNG"), reference, "--shard-size", "20") == 2
    assert "another input" in capsys.readouterr().err


def test_lost_and_cut_shards_are_written_again(pairs: Path, reference: Path, tmp_path: Path) -> None:
    assert shard(pairs, tmp_path, "--shard-size", "20", "--processes", "1") == 0
    (tmp_path / "00002.tar").unlink()
    (tmp_path / "00004.idx").unlink()
    with open(tmp_path / "00005.tar", "r+b") as file:
        file.truncate(1000)
    assert shard(pairs, tmp_path, "--shard-size", "20", "--processes", "1") == 0
    assert contents(tmp_path) == contents(reference)


def test_names_with_line_separators_survive_writing_again(tmp_path: Path) -> None:
    """U+2028, U+0085 and their like stand as they are in rejects.jsonl: they end no line of it."""
    odd = ["line\u2028separator", "next\x85line", "form\x0cfeed", "file\x1cseparator", "paragraph\u2029separator"]
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate([*odd, *map(str, range(30))]):
        (folder / f"{name}.png").write_bytes(encoded(picture(number)) if number >= len(odd) else b"no picture")
        (folder / f"{name}.txt").write_text(f"caption {number}")
    options = ("--shard-size", "10", "--processes", "1", "--max-rejected", "1")
    assert shard(folder, tmp_path / "out", *options, columns=()) == 0
    assert len(rejects(tmp_path / "out")) == len(odd)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").unlink()
    assert shard(folder, tmp_path / "out", *options, columns=()) == 0
    assert contents(tmp_path / "out") == before


def _start(arguments: list[str]) -> int:
    """A run in a process of its own, without the cost of starting Python."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os._exit(data_tools(arguments))


def test_sigkill_at_twenty_moments(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 400)
    arguments = ["shard", str(pairs), "OUT", *COLUMNS, "--shard-size", "25", "--processes", "2", "--quiet"]
    whole = tmp_path / "whole"
    arguments[2] = str(whole)
    started = time.monotonic()
    assert os.waitpid(_start(arguments), 0)[1] == 0
    seconds = time.monotonic() - started
    expected = contents(whole)
    rng = random.Random(7)
    interrupted = 0
    for trial in range(20):
        out = tmp_path / f"{trial}"
        arguments[2] = str(out)
        child = _start(arguments)
        time.sleep(rng.uniform(0, seconds))
        # every other time the whole group dies, workers too; else they must notice by themselves
        (os.killpg if trial % 2 and os.getpgid(child) == child else os.kill)(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += not (out / "manifest.json").exists()
        for path in out.glob("*.tar"):
            problems: list[TarProblem] = []
            list(walk(path, problems))
            assert not problems and path.read_bytes() == expected[path.name]
        assert data_tools(arguments) == 0
        assert contents(out) == expected
    assert interrupted >= 10


def test_strict_ends_at_the_first(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_pairs(tmp_path / "pairs", 30)
    (broken.parent / "7.jpeg").write_bytes(b"")
    for processes in ("1", "2"):
        assert (
            shard(broken, tmp_path / f"out{processes}", "--strict", "--shard-size", "10", "--processes", processes) == 2
        )
        assert "pairs.csv:9: the image has 0 bytes (empty_file; --strict stops at the first)" in capsys.readouterr().err
        assert not (tmp_path / f"out{processes}" / "manifest.json").exists()


def test_too_many_rejected_rows_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_pairs(tmp_path / "pairs", 30)
    for number in range(16):
        (broken.parent / f"{number}.jpeg").write_bytes(b"<html>")
    assert shard(broken, tmp_path / "out") == 2
    assert "16 of 30 rows cannot be used (16 html); fix them, or raise --max-rejected" in capsys.readouterr().err
    assert len(rejects(tmp_path / "out")) == 16
    assert shard(broken, tmp_path / "out", "--max-rejected", "0.6") == 0
    assert Dataset.open(tmp_path / "out").manifest["rejected"] == {"html": 16}
    assert len(rejects(tmp_path / "out")) == 16


@pytest.mark.parametrize("processes", ["1", "2"])
def test_pictures_in_another_place_are_named_and_the_mended_command_runs(
    pairs: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    options, out = ("--shard-size", "20", "--processes", processes), tmp_path / "out"
    small = (
        "--shard-size",
        "10",
        "--processes",
        processes,
    )  # shards without a sample are written before the share is known
    mistakes = [
        (("--images", "/nonexist", *COLUMNS), "/nonexist/"),
        (("--image", "caption", "--caption", "image"), f"{pairs.parent}/image number "),
    ]
    for columns, looked in mistakes:
        assert shard(pairs, out, *small, columns=columns) == 2
        error = capsys.readouterr().err
        assert f"the image's file does not exist: {looked}" in error and error.count("\n") == 1
        assert "pairs.csv:" in error and ", key 000" in error and f"{out}/rejects.jsonl names them" in error
        first = json.loads((out / "rejects.jsonl").read_text().split("\n")[0])
        assert first["reason"] == "file_missing" and first["path"].startswith(looked)
    assert shard(pairs, out, *options) == 0
    assert contents(out) == contents(reference)


def test_shards_of_an_older_layout_are_not_mixed_with_new_ones(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LAYOUT", plan.LAYOUT - 1)
    assert shard(pairs, tmp_path, "--task", "0/2") == 0
    monkeypatch.undo()
    capsys.readouterr()
    assert shard(pairs, tmp_path, "--task", "1/2") == 2
    assert (
        f"{tmp_path}: begun with another version of this tool; use the same, or another folder"
        in capsys.readouterr().err
    )


def test_a_plan_stays_while_its_run_is_at_work_or_has_written(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(pairs, tmp_path, "--images", "/nonexist") == 2
    first = Output(str(tmp_path))
    with first.locked("3-of-4"):
        assert shard(pairs, tmp_path) == 2
    assert "begun with images='/nonexist' (now None)" in capsys.readouterr().err
    (tmp_path / "00000.tar").write_bytes(b"a sample")
    assert shard(pairs, tmp_path) == 2
    (tmp_path / "00000.tar").unlink()
    assert shard(pairs, tmp_path) == 0


def test_remote_output(pairs: Path, reference: Path) -> None:
    url = f"memory://shards-{os.getpid()}"
    assert shard(pairs, url, "--shard-size", "20", "--processes", "1") == 0
    system = fsspec.filesystem("memory")
    root = system._strip_protocol(url)
    written = {os.path.relpath(name, root): system.cat_file(name) for name in system.find(root)}
    assert written == contents(reference)
    dataset = Dataset.open(url)
    assert dataset.num_samples == 130 and dataset.shard(3).shape == (20,) and dataset.tar_path(3) == f"{url}/00003.tar"
    assert shard(pairs, url, "--shard-size", "20", "--processes", "1") == 0
    assert shard(pairs, url, "--shard-size", "21", "--processes", "1") == 2


def test_resize_and_order_options(pairs: Path, tmp_path: Path) -> None:
    assert (
        shard(
            pairs,
            tmp_path,
            "--resize",
            "20",
            "--resize-mode",
            "crop",
            "--encode",
            "webp",
            "--keep-order",
            "--processes",
            "1",
        )
        == 0
    )
    samples = read_all(tmp_path)
    assert [int(sample["key"]) for sample in samples] == list(range(130)) and all(
        "webp" in sample for sample in samples
    )
    meta = json.loads(samples[0]["json"])["sample"]
    assert (meta["width"], meta["height"], meta["changed"]) == (20, 20, ["resized"])


def test_dots_and_duplicate_names_stay_apart(tmp_path: Path) -> None:
    """Readers fold KEY.anything into one sample: keys are numbers here, whatever files are called."""
    lines = ["image,caption"]
    for number in range(10):
        folder = tmp_path / f"d{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"photo.v{number // 2}.png").write_bytes(encoded(picture(number)))
        lines.append(f"d{number % 2}/photo.v{number // 2}.png,caption {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    assert shard(tmp_path / "pairs.csv", tmp_path / "out") == 0
    read = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert len(read) == 10 and {sample["txt"].decode() for sample in read} == {
        f"caption {number}" for number in range(10)
    }


def test_webdataset_reads_equal_samples(reference: Path) -> None:
    urls = [str(path) for path in sorted(reference.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = read_all(reference)
    assert [{name: sample[name] for name in ("jpg", "txt", "json")} for sample in read] == [
        {name: sample[name] for name in ("jpg", "txt", "json")} for sample in ours
    ]


def test_hugging_face_datasets_reads_equal_samples(reference: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in sorted(reference.glob("*.tar"))]
    read = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path))
    ours = read_all(reference)
    assert [row["txt"] for row in read] == [sample["txt"].decode() for sample in ours]
    assert [row["json"]["number"] for row in read] == [json.loads(sample["json"])["number"] for sample in ours]
    assert all(row["jpg"].size == (48, 40) for row in read)


def test_open_clip_reads_equal_samples(reference: Path) -> None:
    """Its training package has a loader of its own; installed beside webdataset 0.2.86, which its own tests need."""
    data = pytest.importorskip("open_clip_train.data")
    shards = "{00000..00006}.tar"
    options = {
        "val_data": f"{reference}/{shards}",
        "batch_size": 10,
        "workers": 1,
        "seed": 0,
        "world_size": 1,
        "val_num_samples": None,
    }
    options |= {
        "train_data": None,
        "train_num_samples": None,
        "train_data_upsampling_factors": None,
        "dataset_resampled": False,
    }
    info = data.get_wds_dataset(SimpleNamespace(**options), np.asarray, is_train=False, tokenizer=lambda text: [text])
    read = [
        (picture, text) for pictures, texts in info.dataloader for picture, text in zip(pictures, texts, strict=True)
    ]
    ours = read_all(reference)
    assert [text for _, text in read] == [sample["txt"].decode() for sample in ours]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")) for sample in ours])
    assert np.array_equal(np.stack([picture for picture, _ in read]), expected)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_full_disk_is_one_line_and_the_run_continues_later(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_tools.format.tar_writer.os.fsync", fail)
    assert shard(pairs, tmp_path, "--processes", processes, "--shard-size", "20") == 2
    error = capsys.readouterr().err
    assert "No space left on device; fix this and run again to continue" in error and error.count("\n") == 1
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tar")) and shard(pairs, tmp_path, "--shard-size", "20") == 0


def test_a_worker_that_is_killed_ends_the_run(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_tools.sharding.write_shard.prepare", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert shard(pairs, tmp_path, "--processes", "2", "--shard-size", "20") == 2
    assert "a worker process was killed by SIGKILL; run again, with fewer" in capsys.readouterr().err
    monkeypatch.undo()
    assert shard(pairs, tmp_path, "--shard-size", "20") == 0


def test_ctrl_c_ends_at_once_and_the_run_continues_later(reference: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 130)
    arguments = [
        "shard",
        str(pairs),
        str(tmp_path / "out"),
        *COLUMNS,
        "--shard-size",
        "20",
        "--processes",
        "2",
        "--quiet",
    ]
    os.mkfifo(tmp_path / "pairs" / "wait.jpeg")
    pairs.write_text(pairs.read_text() + "wait.jpeg,never comes,0\n")
    child = _start(arguments)
    deadline = time.monotonic() + 30
    while len(list((tmp_path / "out").glob("*.tar"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert not (tmp_path / "out" / "manifest.json").exists()
    os.unlink(tmp_path / "pairs" / "wait.jpeg")
    assert data_tools(arguments) == 0
    assert Dataset.open(tmp_path / "out").num_samples == 130 and list(rejects(tmp_path / "out").values()) == [
        "file_missing"
    ]


def test_progress_names_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ShardProgress(total=1000, done=100)
    progress.started -= 2
    progress._recent[0] = (progress.started, 0)
    progress.add_tally(Tally(180, 5_000_000, Counter({"html": 15, "truncated": 5})))
    line = capsys.readouterr().err
    assert "300/1,000 rows" in line and "left out 20 (html 15, truncated 5)" in line and "2.5 MB/s" in line
    assert 95 <= int(line.split(" | ")[1].split()[0]) <= 100 and "ETA 0:00:07" in line
    progress.close()
    assert "ETA" not in capsys.readouterr().err


def test_two_runs_at_once_are_kept_apart(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Output(str(tmp_path))
    first.start()
    monkeypatch.setattr(output, "PATIENCE", 0.2)
    with first.locked("0-of-1"):
        assert shard(pairs, tmp_path) == 2
    assert shard(pairs, tmp_path) == 0


def test_user_mistakes_are_one_line(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for arguments, expected in [
        ((str(tmp_path / "no.csv"), str(out), *COLUMNS), "no such file or folder"),
        (
            (str(pairs), str(out), "--image", "picture", "--caption", "caption"),
            "no column 'picture' (--image); there are: image, caption",
        ),
        (
            (str(pairs), str(out), "--image", "image"),
            "say which column holds the caption: --caption COLUMN; there are: image, caption",
        ),
    ]:
        assert data_tools(["shard", *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    (tmp_path / "web.csv").write_text("image,caption\nhttps://example.org/a.jpg,a\n")
    assert shard(tmp_path / "web.csv", out) == 2
    assert "pip install img2dataset && img2dataset --url_list" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("source", "out", "expected"),
    [
        ("PAIRS", "nope://bucket/x", "nope://bucket/x: unknown protocol nope://; fsspec knows s3://"),
        (
            "PAIRS",
            "uninstalled://bucket/x",
            "the package for uninstalled:// is not installed (Install nothere): pip install nothere",
        ),
        (
            "PAIRS",
            "unreachable://bucket/x",
            "unreachable://bucket/x: cannot be reached (RuntimeError: no such host); check the address",
        ),
        ("s3://bucket/x.csv", "OUT", "s3://bucket/x.csv: the input must be local; copy it here first"),
        ("https://127.0.0.1:9/x.csv", "OUT", "x.csv: the input must be local"),
        ("PAIRS", "PAIRS", "pairs.csv: a file; name a folder"),
        ("PAIRS", "PAIRS/deeper", "pairs.csv is a file; name a folder"),
    ],
)
def test_places_that_cannot_be_are_one_line(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: str,
    expected: str,
) -> None:
    class Unreachable(fsspec.AbstractFileSystem):
        def info(self, path: str, **_: object) -> dict[str, object]:
            raise RuntimeError("no such host")

    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    monkeypatch.setitem(known_implementations, "uninstalled", {"class": "nothere.FileSystem", "err": "Install nothere"})
    names = {"PAIRS": str(pairs), "OUT": str(tmp_path / "out"), "PAIRS/deeper": f"{pairs}/deeper"}
    assert shard(names.get(source, source), names.get(out, out)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--task", "3/3"), "--task: '3/3' is not I/N with I from 0 to N - 1"),
        (("--shard-size", "0"), "--shard-size: '0' is not a whole number of 1 or more"),
        (("--quality", "1000"), "--quality: '1000' is not a whole number from 1 to 100"),
        (("--max-rejected", "2"), "--max-rejected: '2' is not a number from 0 to 1"),
        (("--max-rejected", "-1"), "--max-rejected: '-1' is not"),
        (("--max-aspect", "nan"), "--max-aspect: 'nan' is not a number of 1 or more"),
        (("--seed", "-1"), "--seed: '-1' is not"),
        (("--resize", "wide"), "--resize: 'wide' is not"),
        (("--nonsense",), "unrecognized arguments: --nonsense; `python -m data_tools shard --help` says more"),
    ],
)
def test_values_that_make_no_sense_are_one_line(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    assert shard(pairs, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and expected in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    )
