"""The tar writer against tarfile, and the header walk on archives that are broken on purpose."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.format.index import ROW
from data_tools.format.scan import hash_key, read_key, scan_samples, scan_tar, split_name
from data_tools.format.tar_reader import TarProblem, walk
from data_tools.format.tar_writer import TarWriter, header
from data_tools.samples.reject import REASONS


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for number in range(count)
        for member in ((f"{number:03d}.jpg", b"j" * (600 + number)), (f"{number:03d}.txt", b"text"))
    ]


def found(path: Path) -> tuple[list[str], list[str]]:
    """(Keys of whole samples, reasons)."""
    problems: list[TarProblem] = []
    keys = [key for key, _ in scan_samples(path, problems)]
    assert all(problem.reason in REASONS for problem in problems)
    return keys, [problem.reason for problem in problems]


@given(st.lists(st.tuples(st.text("abz09._-/é", min_size=1, max_size=40), st.binary(max_size=3000)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_writer_equals_tarfile(tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]]) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    writer = TarWriter(path)
    members = [(f"x{name.replace('//', '/').rstrip('/')}", data) for name, data in members]
    offsets = [writer.add(name, data) for name, data in members]
    writer.close()
    raw = path.read_bytes()
    assert len(raw) == writer.bytes and len(raw) % 512 == 0
    with tarfile.open(path) as tar:
        read = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert read == members
    assert [raw[offset : offset + len(data)] for offset, (_, data) in zip(offsets, members, strict=True)] == [
        data for _, data in members
    ]


def test_header_is_that_of_tarfile() -> None:
    info = tarfile.TarInfo("000000012.jpg")
    info.size, info.mode = 69_123, 0o444
    assert header(b"000000012.jpg", 69_123) == info.tobuf(tarfile.USTAR_FORMAT)


def test_large_members_and_many_members(tmp_path: Path) -> None:
    writer = TarWriter(tmp_path / "a.tar")
    data = [np.random.default_rng(number).bytes(3 << 20) for number in range(5)] + [b"small"] * 3000
    for number, item in enumerate(data):
        writer.add(f"{number}.bin", item)
    writer.close()
    problems: list[TarProblem] = []
    members = list(walk(tmp_path / "a.tar", problems))
    raw = (tmp_path / "a.tar").read_bytes()
    assert not problems and [raw[member.offset : member.offset + member.size] for member in members] == data


def test_name_splits() -> None:
    assert split_name("a/b.jpg") == ("a/b", "jpg")
    assert split_name("x.v1.JPG") == ("x.v1", "jpg")
    assert split_name("x.seg.npy") == ("x", "seg.npy")
    assert split_name("folder.d/noext") == ("folder.d/noext", "")
    assert split_name(".hidden") == ("", "hidden")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_format(tmp_path: Path, format: int) -> None:
    stem = "folder/" + "n" * 90 + ("/" + "m" * 60 if format == tarfile.USTAR_FORMAT else "ü" * 60)
    path = make_tar(tmp_path / "a.tar", [(f"{stem}.jpg", b"picture"), (f"{stem}.txt", b"text")], format)
    assert found(path) == ([stem], [])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_of_long_names(tmp_path: Path, format: int) -> None:
    stems = ["f" * 60 + "/" + "n" * 60 + str(number) for number in range(3)] + ["short", "x" * 96]
    members = [(f"{stem}.{kind}", b"data" * 300) for stem in stems for kind in ("txt", "jpg")]
    rows, problems = scan_tar(make_tar(tmp_path / "a.tar", members, format))
    with open(tmp_path / "a.tar", "rb") as file:
        assert not problems and [read_key(file.fileno(), row) for row in rows] == stems


def test_keys_behind_several_records_and_false_ones(tmp_path: Path) -> None:
    """A pax record of several blocks, one with a link's long name between, and an image that itself looks like a
    long-name record."""
    long = "n" * 150
    bait = tarfile.TarInfo("././@LongLink")
    bait.type, bait.size = tarfile.GNUTYPE_LONGNAME, 4
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, headers in [
            (f"{long}.jpg", b"j", {"comment": "c" * 30_000}),
            (f"{long}.txt", bait.tobuf(tarfile.GNU_FORMAT) + b"bait".ljust(512, b"\0"), {}),
            ("plain.jpg", b"j", {}),
            ("plain.txt", b"t", {}),
        ]:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), headers
            tar.addfile(info, io.BytesIO(data))
    rows, problems = scan_tar(tmp_path / "a.tar")
    with open(tmp_path / "a.tar", "rb") as file:
        assert not problems and [read_key(file.fileno(), row) for row in rows] == [long, "plain"]


def test_the_key_of_a_damaged_header_is_what_it_says(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", samples(2), tarfile.GNU_FORMAT)
    rows, _ = scan_tar(path)
    raw = bytearray(path.read_bytes())
    raw[int(rows[1]["image_offset"]) - 512] = ord("Z")
    path.write_bytes(raw)
    with open(path, "rb") as file:
        assert [read_key(file.fileno(), row) for row in rows] == ["000", "Z01"]


def test_rows_of_a_foreign_tar(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar",
        [("b.json", b"{}"), ("b.txt", b"two"), ("a.png", b"PNG"), ("b.jpg", b"JPEG"), ("a.txt", b"one")],
    )
    rows, problems = scan_tar(path)
    raw = path.read_bytes()
    assert not problems and rows.dtype == ROW and len(rows) == 2
    assert [raw[row["image_offset"] :][: row["image_size"]] for row in rows] == [b"PNG", b"JPEG"]
    assert [raw[row["text_offset"] :][: row["text_size"]] for row in rows] == [b"one", b"two"]
    assert rows["json_size"].tolist() == [0, 2] and rows["image_format"].tolist() == [2, 1]
    assert rows["key_hash"].tolist() == [hash_key("a"), hash_key("b")]
    with open(path, "rb") as file:
        assert [read_key(file.fileno(), row) for row in rows] == ["a", "b"]


def test_missing_partner_and_unsorted(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("c.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4"), ("b.txt", b"5"), ("d.txt", b"6")]
    keys, reasons = found(make_tar(tmp_path / "a.tar", members))
    assert keys == ["b", "a"] and sorted(reasons) == ["missing_image", "missing_text"]


def test_dotted_and_duplicate_keys(tmp_path: Path) -> None:
    dotted = [member for n in range(10) for member in ((f"photo.v{n}.jpg", b"p"), (f"photo.v{n}.txt", b"t"))]
    assert found(make_tar(tmp_path / "a.tar", dotted)) == ([f"photo.v{n}" for n in range(10)], [])
    twice = [("a.jpg", b"1"), ("a.txt", b"t"), ("a.jpg", b"2"), ("a.txt", b"t")]
    assert found(make_tar(tmp_path / "b.tar", twice)) == (["a", "a"], ["duplicate_key"])


def test_bad_header_in_the_middle_costs_its_own_sample(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", samples(10))
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("004.jpg").offset
    raw[start + 100 : start + 300] = b"\xff" * 200
    path.write_bytes(raw)
    keys, reasons = found(path)
    assert keys == [f"{n:03d}" for n in range(10) if n != 4] and reasons == ["bad_header", "missing_image"]


def test_cut_tars(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", samples(10))
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        at_header, in_member = tar.getmember("006.jpg").offset, tar.getmember("006.jpg").offset_data + 100
    path.write_bytes(raw[:at_header])
    assert found(path) == ([f"{n:03d}" for n in range(6)], ["no_end_marker"])
    path.write_bytes(raw[:in_member])
    assert found(path) == ([f"{n:03d}" for n in range(6)], ["cut_in_member"])
    path.write_bytes(b"")
    assert found(path) == ([], ["no_end_marker"])


def test_concatenated_tars_are_both_read(tmp_path: Path) -> None:
    first = make_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"t")]).read_bytes()
    second = make_tar(tmp_path / "b.tar", [("b.jpg", b"1"), ("b.txt", b"t")]).read_bytes()
    (tmp_path / "c.tar").write_bytes(first + second)
    assert found(tmp_path / "c.tar") == (["a", "b"], ["concatenated"])


def test_links_devices_and_unsafe_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.FIFOTYPE),
            ("d.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../e.jpg", "/f.jpg", "g/../../h.jpg", "ok.jpg", "ok.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert found(path) == (
        ["ok"],
        ["link", "link", "special_file", "special_file", "unsafe_name", "unsafe_name", "unsafe_name"],
    )


def test_empty_pictures_are_not_samples(tmp_path: Path) -> None:
    assert found(make_tar(tmp_path / "a.tar", [("a.jpg", b""), ("a.txt", b"t")])) == (
        [],
        ["empty_file", "missing_image"],
    )


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_fuzzed_tars_never_crash_or_hang(tmp_path_factory: pytest.TempPathFactory, seed: int, changes: int) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(make_tar(folder / "a.tar", samples(6), tarfile.PAX_FORMAT).read_bytes())
    rng = random.Random(seed)
    for _ in range(changes):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    (folder / "a.tar").write_bytes(raw[: rng.randrange(len(raw))] if seed % 3 == 0 else raw)
    rows, problems = scan_tar(folder / "a.tar")
    assert len(rows) <= 6 and all(int(row["image_offset"]) + int(row["image_size"]) <= len(raw) for row in rows)
    assert all(problem.reason in REASONS for problem in problems)
