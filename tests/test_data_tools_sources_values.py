"""Every type that Arrow, CSV and JSON give, as image, as caption and as another column."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_tools.samples.reject import Reject
from data_tools.sources.base import SourceOptions
from data_tools.sources.values import fill, picture_of, plain, reach, to_row
from tests.support.picture_files import encoded, picture, rejects, shard
from tests.test_data_tools_sources import captions, metas, pictures

PNG = encoded(picture(0))
TEXT = base64.b64encode(PNG).decode()
STRUCT = pa.struct([("en", pa.string()), ("de", pa.string())])
NOT_TEXT = "not text"

ARROW = {  # type: (array of two values, as caption: texts or a part of the error, as another column)
    "string": (pa.array(["a", "b"]), ["a", "b"], ["a", "b"]),
    "large_string": (pa.array(["a", "b"], pa.large_string()), ["a", "b"], ["a", "b"]),
    "string_view": (pa.array(["a", "b"], pa.string_view()), ["a", "b"], ["a", "b"]),
    "dictionary": (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"], ["a", "b"]),
    "binary": (pa.array([b"a", b"b"]), ["a", "b"], "left out"),
    "large_binary": (pa.array([b"a", b"b"], pa.large_binary()), ["a", "b"], "left out"),
    "binary_view": (pa.array([b"a", b"b"], pa.binary_view()), ["a", "b"], "left out"),
    "fixed_size_binary": (pa.array([b"a", b"b"], pa.binary(1)), ["a", "b"], "left out"),
    "list": (pa.array([["a"], ["b"]]), ["a", "b"], [["a"], ["b"]]),
    "large_list": (pa.array([["a"], ["b"]], pa.large_list(pa.string())), ["a", "b"], [["a"], ["b"]]),
    "list_view": (pa.array([["a"], ["b"]], pa.list_view(pa.string())), ["a", "b"], [["a"], ["b"]]),
    "fixed_size_list": (pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)), ["a", "b"], [["a"], ["b"]]),
    "list of binary": (pa.array([[b"a"], [b"b"]]), ["a", "b"], "left out"),
    "json": (pa.array(['{"a":1}', "b"], pa.json_()), ['{"a":1}', "b"], ['{"a":1}', "b"]),
    "null": (pa.nulls(2), [], [None, None]),
    "list of lists": (pa.array([[["a"]], [["b"]]]), "lists of lists", [[["a"]], [["b"]]]),
    "bool": (pa.array([True, False]), "booleans, not text", [True, False]),
    "int": (pa.array([1, 2]), "integers, not text", [1, 2]),
    "uint64": (pa.array([1, 2**64 - 1], pa.uint64()), "integers, not text", [1, 2**64 - 1]),
    "float": (pa.array([4.0, float("nan")]), "floating-point numbers, not text", [4.0, None]),
    "half": (pa.array([4.0, float("inf")], pa.float16()), "floating-point numbers, not text", [4.0, None]),
    "decimal": (pa.array([decimal.Decimal("1.50"), None]), "type Decimal, not text", ["1.50", None]),
    "interval": (pa.array([(1, 2, 3)] * 2, pa.month_day_nano_interval()), "not text", [[1, 2, 3]] * 2),
    "struct": (pa.array([{"en": "a", "de": "b"}] * 2, STRUCT), "fields en, de; name one", [{"en": "a", "de": "b"}] * 2),
    "struct with bytes": (pa.array([{"x": b"a"}] * 2), "with the fields x", "left out"),
    "map": (pa.array([[("en", "a")]] * 2, pa.map_(pa.string(), pa.string())), "tuples, not text", [{"en": "a"}] * 2),
    "union": (
        pa.UnionArray.from_dense(
            pa.array([0, 0], pa.int8()), pa.array([0, 1], pa.int32()), [pa.array(["a", "b"])]
        ),
        ["a", "b"],
        ["a", "b"],
    ),
}  # fmt: skip
TIMES = {  # as text, whatever Python's own types can hold
    "date": (pa.array([datetime.date(2020, 1, 2), None]), ["2020-01-02", None]),
    "timestamp ns": (pa.array([1, 2], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000001", "1970-01-01 00:00:00.000000002"]),
    "timestamp far": (pa.array([0, 2**60], pa.timestamp("s")), ["1970-01-01 00:00:00", f"<value out of range: {2**60}>"]),
    "timestamp zone": (pa.array([0, 1], pa.timestamp("s", "UTC")), ["1970-01-01 00:00:00Z", "1970-01-01 00:00:01Z"]),
    "timestamp of no zone": (pa.array([0, 1], pa.timestamp("s", "Nowhere/Land")), [None, None]),
    "time": (pa.array([1, 2], pa.time64("ns")), ["00:00:00.000000001", "00:00:00.000000002"]),
    "duration": (pa.array([1, 2**60], pa.duration("ns")), ["1", str(2**60)]),
    "list of timestamps": (pa.array([[0], [2**60]], pa.list_(pa.timestamp("s"))), [["1970-01-01 00:00:00"], [f"<value out of range: {2**60}>"]]),
    "struct of dates": (pa.array([{"d": 0}] * 2, pa.struct([("d", pa.date32())])), [{"d": "1970-01-01"}] * 2),
}  # fmt: skip


def save_arrow(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ARROW)
def test_every_arrow_type_as_caption(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, expected, _ = ARROW[kind]
    path = save_arrow(tmp_path / "a.arrow", pa.table({"image": [PNG, PNG], "caption": values}))
    code = shard(path, tmp_path / "out", "--max-rejected", "1", "--keep-order", "--processes", "1")
    if isinstance(expected, str):
        error = capsys.readouterr().err
        assert code == 2 and "'caption' holds" in error and expected in error and error.count("\n") == 1
    else:
        assert code == 0 and captions(tmp_path / "out") == sorted(expected)


@pytest.mark.parametrize("kind", [*ARROW, *TIMES])
def test_every_arrow_type_as_another_column(kind: str, tmp_path: Path) -> None:
    values, expected = ARROW[kind][::2] if kind in ARROW else TIMES[kind]
    table = pa.table({"image": [PNG, PNG], "caption": ["a", "b"], "more": values})
    assert shard(save_arrow(tmp_path / "a.arrow", table), tmp_path / "out", "--processes", "1") == 0
    found = [meta.get("more", "left out") for meta in metas(tmp_path / "out")]
    assert found == (["left out"] * 2 if expected == "left out" else expected)
    for sample in metas(tmp_path / "out"):
        json.dumps(sample, allow_nan=False)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "run_end", "binary", "large_binary", "binary_view"])  # fmt: skip
@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_every_arrow_type_as_picture(kind: str, form: str, tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    text = pa.array(["0.png", "1.png"])
    made = {
        "run_end": lambda: pc.run_end_encode(text),
        "dictionary": text.dictionary_encode,
        "string": lambda: text,
        "large_string": lambda: text.cast(pa.large_string()),
        "string_view": lambda: text.cast(pa.string_view()),
        "binary": lambda: pa.array([encoded(picture(0)), encoded(picture(1))]),
        "large_binary": lambda: pa.array([encoded(picture(0)), encoded(picture(1))], pa.large_binary()),
        "binary_view": lambda: pa.array([encoded(picture(0)), encoded(picture(1))], pa.binary_view()),
    }
    table = pa.table({"image": made[kind](), "caption": ["a", "b"]})
    path = tmp_path / f"a.{form}"
    if form == "parquet" and kind == "run_end":
        pytest.skip("Parquet does not hold run-end encoding")
    if form == "arrow":
        save_arrow(path, table)
    else:
        pq.write_table(table, path)
    assert shard(path, tmp_path / "out", "--processes", "1") == 0 and captions(tmp_path / "out") == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (PNG, PNG),
        ("a/b.png", "a/b.png"),
        ("s3://bucket/a.png", "s3://bucket/a.png"),
        (None, None),
        ("", ""),
        ({"bytes": PNG, "path": "a.png"}, PNG),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        (TEXT, PNG),
        (TEXT.rstrip("="), PNG),
        (base64.urlsafe_b64encode(PNG).decode(), PNG),
        ("\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)), PNG),
        (f"data:image/png;base64,{TEXT}", PNG),
        (f"DATA:image/png;name=x;base64,{TEXT}", PNG),
        ("data:image/svg+xml,%3Csvg", b"<svg"),
        ("data:image/png;base64,!!!!", "image_encoding"),
        ("data:nothing", "image_encoding"),
        (TEXT[:101], "image_encoding"),
        ("/9j/" + "x" * 80 + ".jpg", "/9j/" + "x" * 80 + ".jpg"),
        (["a.png"], "image_type"),
        (3, "image_type"),
        (True, "image_type"),
        ({"x": 1}, "image_type"),
    ],
)
def test_pictures(value: Any, expected: Any) -> None:
    try:
        found = picture_of("image", value)
    except Reject as reject:
        found = reject.reason
    assert found == expected


def test_names_with_dots_reach_inside() -> None:
    record = {
        "d": {"en": "a", "list": [{"raw": "x"}, {"raw": "y"}]},
        "json": '{"en": ["b"]}',
        "map": [("en", "c")],
        "a.b": "whole",
        "a": {"b": "inner"},
        "broken": "{",
    }
    expected = {
        "d.en": "a",
        "d.list.raw": ["x", "y"],
        "d.list.1.raw": "y",
        "d.list.7.raw": None,
        "json.en": ["b"],
        "json.en.0": "b",
        "map.en": "c",
        "a.b": "whole",
        "a.c": None,
        "broken.x": None,
        "nothing": None,
        "nothing.at.all": None,
        "d.list.99999999999999": None,
    }
    assert {name: reach(record, name) for name in expected} == expected


def test_captions_inside_structs_and_json_texts(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    pq.write_table(
        pa.table({"image": ["0.png"], "d": pa.array([{"en": "a", "de": "b"}], STRUCT)}), tmp_path / "a.parquet"
    )
    (tmp_path / "b.csv").write_text('image,d\n0.png,"{""en"": ""a"", ""de"": ""b""}"\n')
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": "0.png", "d": {"en": "a", "de": "b"}}))
    for name in ("a.parquet", "b.csv", "c.jsonl"):
        columns = ("--image", "image", "--caption", "d.en", "--caption", "d.de")
        assert shard(tmp_path / name, tmp_path / f"out-{name}", columns=columns) == 0
        assert metas(tmp_path / f"out-{name}")[0]["captions"] == ["a", "b"]


def test_a_type_that_changes_later_costs_its_rows_alone(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    rows: list[Any] = [
        {"image": "0.png", "caption": "fine"},
        {"image": "0.png", "caption": 4.0},
        {"image": 7, "caption": "x"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert shard(tmp_path / "a.jsonl", tmp_path / "out", "--max-rejected", "1") == 0
    assert rejects(tmp_path / "out") == {"a.jsonl:2": "caption_type", "a.jsonl:3": "image_type"}


def test_templates() -> None:
    record = {"breed": "pug", "age": 3, "size": {"kg": 7.5}, "none": None, "list": [1], "odd": "{age}"}
    assert fill("a {age} year old {breed} of {size.kg} kg", record) == "a 3 year old pug of 7.5 kg"
    assert fill("{none}", record) is None and fill("{odd} {}", record) == "{age} {}"
    with pytest.raises(Reject, match="caption_type"):
        fill("{list}", record)
    row = to_row("x", record, SourceOptions(image="breed", captions=("breed",), templates=("a {breed}", "{age} years")))
    assert row.captions == ["pug", "a pug", "3 years"]


def test_numbers_in_a_csv_are_a_loud_line_and_templates_make_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "a.csv").write_text("image,score\n0.png,4.0\n1.png,3.5\n")
    assert shard(tmp_path / "a.csv", tmp_path / "out", columns=("--image", "image", "--caption", "score")) == 0
    assert "WARNING: the captions (score) are numbers: 4.0, 3.5" in capsys.readouterr().err
    columns = ("--image", "image", "--caption-template", "scored {score}")
    assert shard(tmp_path / "a.csv", tmp_path / "out2", columns=columns) == 0
    assert captions(tmp_path / "out2") == ["scored 3.5", "scored 4.0"] and "WARNING" not in capsys.readouterr().err


def test_plain_is_strict_json() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    assert plain({"a": float("nan"), "b": [(1, 2)], "c": decimal.Decimal("1.0")}) == {
        "a": None,
        "b": [[1, 2]],
        "c": "1.0",
    }
    assert to_row("x", {"deep": deep, "n": 1}, SourceOptions()).columns == {"n": 1}


def test_class_labels_of_hugging_face_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "big_dog"], "_type": "ClassLabel"}}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [PNG, PNG], "label": [1, 0]}).replace_schema_metadata(schema)
    pq.write_table(table, tmp_path / "a.parquet")
    columns = ("--image", "image", "--caption-template", "a {label}")
    assert shard(tmp_path / "a.parquet", tmp_path / "out", columns=columns) == 0
    assert captions(tmp_path / "out") == ["a big dog", "a cat"]
    assert [(meta["cls"], meta["class"]) for meta in metas(tmp_path / "out")] == [(1, "big dog"), (0, "cat")]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "cat\nbig dog\n"
    assert shard(tmp_path / "a.parquet", tmp_path / "no", columns=("--image", "image", "--caption", "label")) == 2
    assert "'label' holds integers" in capsys.readouterr().err
