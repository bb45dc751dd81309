"""The report: every part that is there, nothing that is not, no character of a caption taken for markup, long logs kept
short."""

from __future__ import annotations

import base64
import json
import math
import re
from array import array
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainer.core.types import UserError
from trainer.plan.bar_chart import bars as plan_bars
from trainer.report import main, write_report
from trainer.report.chart import Axis, json_script, line_chart, linear_axis, log_axis, short
from trainer.report.curves import MetricCurve, read_log, thin

EVIL = '<script>alert("x")</script> & "quotes" \' </style> مرحبا 🙂'
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    VOID = frozenset({"meta", "img", "br", "line", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


def write_log(run: Path, steps: int, **more: Any) -> None:
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "samples_seen": 8 * step,
            "loss": 5.0 / step,
            "lr": 1e-3,
            "grad_norm": 1.0 + step % 3,
            "scale": 10.0,
            "bias": -10.0,
        }
        measured = {
            "pairs_per_second": 100.0,
            "step_seconds": 0.08,
            "seconds": 0.08 * step,
            "memory_bytes": 2**30,
            "data_wait": 0.05,
        }
        lines.append(json.dumps(record | measured | more))
        if step % 4 == 0:
            lines.append(json.dumps({"samples_seen": 8 * step, "eval": {"image_to_text_r1": 0.5, "face_top1": 0.9}}))
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")


def evaluation(name: str = "face") -> dict[str, Any]:
    return {
        "model": "runs/x",
        "command": f"python -m trainer.evaluate runs/x --label '{name}'",
        "metrics": {
            "image_to_text_r1": 0.781,
            "text_to_image_r1": 0.7,
            f"{name}_top1": 0.95,
            f"{name}_strict_top1": 0.8,
        },
        "standard_errors": {"image_to_text_r1": 0.013, "text_to_image_r1": 0.0},
        "ceilings": {"image_to_text_r1": 0.994, "text_to_image_r1": 1.0, f"{name}_strict_top1": 0.82},
        "base_metrics": None,
        "datasets": {"shards/test": {"samples": 2000, "pictures": 999, "captions": 1000, "damaged": 1}},
        "zeroshot": {name: {"classes": 2, "templates": ["{character}, {face}"], "by_class": {"sans": 0.9, name: 1.0}}},
        "time": "2026-01-01T00:00:00+00:00",
    }


def gallery(caption: str = "digit one, sans") -> dict[str, Any]:
    answers = [
        {"caption": f"{caption} {number}", "score": 0.9 - number / 10, "right": number == 1} for number in range(5)
    ]
    lost = [{"picture": number, "score": 0.9 - number / 10, "right": False} for number in range(5)]
    dataset = {
        "name": "shards/test",
        "image_to_text": [
            {"picture": 0, "captions": [caption], "place": 2, "answers": answers},
            *(
                {"picture": 1, "captions": [caption], "place": 1, "answers": [{**answers[0], "right": True}]}
                for _ in range(8)
            ),
        ],
        "text_to_image": [{"caption": caption, "picture": 9, "place": 17, "answers": lost}],
        "thumbnails": {str(number): PIXEL for number in range(10)},
    }
    return {"scale": 20.0, "bias": -10.0, "datasets": [dataset]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with everything in it."""
    folder = tmp_path / "quickstart"
    folder.mkdir()
    write_log(folder, 12)
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    (folder / "gallery.json").write_text(json.dumps(gallery()))
    (folder / "recipe.yaml").write_text(
        "# a comment\nrun:\n  samples: 96\nbatch:\n  size: 8\nmodel:\n  config: {model_type: siglip}\n"
    )
    (folder / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    start = {
        "time": "2026-01-01",
        "command": ["python", "-m", "trainer.train"],
        "packages": {"torch": "2.13.0"},
        "ranks": 2,
        "devices": [],
        "hosts": {"a": 2},
    }
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    return folder


def page(folder: Path) -> Page:
    main([str(folder)])
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_whole_run(run: Path) -> None:
    found = page(run)
    for words in (
        "quickstart",
        "siglip from a config · 96 pairs seen · global batch 8 · 2 ranks on CPU",
        "78.1%",
        "± 1.3 · at most 99.4%",
        "face, filed name only, top-1",
        "999 of 2,000 images, 1,000 captions, 1 damaged left out",
        "Held-out scores",
        "Waiting for data",
        "digit one, sans",
        "wrong: the right one is number 17",
        "torch 2.13.0",
        '"stage": 1',
    ):
        assert words in found.text, words
    assert found.count("figure") == 10
    assert "Not evaluated yet" not in found.text
    assert found.count("img") == 9 + 6  # eight right images and a wrong one; five answers and, having missed, its own


def test_scores_of_averaged_weights_say_so(run: Path) -> None:
    words = "of the running average of the weights"
    assert words not in page(run).text
    with (run / "recipe.yaml").open("a") as file:
        file.write("optim:\n  ema: 0.999\n")
    assert words in page(run).text


def test_it_asks_for_nothing_from_elsewhere(run: Path) -> None:
    text = (write_report(run, run / "report.html")).read_text(encoding="utf-8")
    found = Page(text)
    assert all(
        str(value).startswith("data:image/")
        for _, attributes in found.tags
        for key, value in attributes.items()
        if key in ("src", "href")
    )
    assert not re.search(r"@import|url\(|https?://", text)


def test_captions_are_text_whatever_is_in_them(run: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps(evaluation(EVIL)))
    (run / "gallery.json").write_text(json.dumps(gallery(EVIL)))
    (run / "recipe.yaml").write_text(f"run: {{}}\nnote: {json.dumps(EVIL)}\n# {EVIL}\n")
    (run / "log.jsonl").write_text(json.dumps({"samples_seen": 8, "loss": 1.0, "eval": {f"{EVIL}_top1": 0.5}}) + "\n")
    found = page(run)
    assert found.text.count(EVIL) > 10
    chart_data = found.count("script", type="application/json")
    assert found.count("script") == chart_data + 1
    assert found.count("style") == 1


def test_the_forecast_is_an_image_whatever_is_in_it(run: Path) -> None:
    bars = {"parameters": 1e9, "activations": 2e9}
    drawing = plan_bars([(EVIL, bars, "micro-batch 8")], 4e9, "a recipe") + EVIL
    (run / "plan.svg").write_text(drawing, encoding="utf-8")
    found = page(run)
    assert "Memory forecast" in found.text and EVIL not in found.text
    (shown,) = [attributes for tag, attributes in found.tags if tag == "img" and attributes.get("class") == "plan"]
    assert base64.b64decode(str(shown["src"]).removeprefix("data:image/svg+xml;base64,")).decode() == drawing


@pytest.mark.parametrize(
    "absent", ["evaluation.json", "gallery.json", "recipe.yaml", "deepspeed.json", "environment.json", "log.jsonl"]
)
def test_a_part_that_is_missing_is_left_out(run: Path, absent: str) -> None:
    (run / absent).unlink()
    found = page(run)
    assert ("Not evaluated yet" in found.text) == (absent == "evaluation.json")
    assert ("There is no log.jsonl here" in found.text) == (absent == "log.jsonl")
    assert (found.count("figure") == 0) == (absent == "log.jsonl")


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    write_log(tmp_path, 1)
    found = page(tmp_path)
    assert "Not evaluated yet: python -m trainer.evaluate" in found.text
    assert found.count("figure") == 9


def test_what_steps_say_of_the_model_is_drawn(tmp_path: Path) -> None:
    write_log(
        tmp_path, 3, vitals={"image_to_text_r1": 0.25, "logit_matched": 1.0, "logit_other": -4.0, "dims_images": 7}
    )
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"samples_seen": 24, "advice": "this run learns nothing: t < 1"}\n' * 2)
    found = page(tmp_path)
    assert found.text.count("Advice: this run learns nothing: t < 1") == 1
    assert found.count("figure") == 9 + 4
    for title in (
        "Retrieved in the batch",
        "Logit of matched pairs",
        "Logit of other pairs",
        "Dimensions of the images",
    ):
        assert title in found.text


def test_a_comparison_shows_the_change(run: Path) -> None:
    against = evaluation() | {"against": "google/siglip", "base_metrics": dict.fromkeys(evaluation()["metrics"], 0.75)}
    (run / "evaluation.json").write_text(json.dumps(against))
    found = page(run)
    assert "The base is google/siglip." in found.text
    assert "+3.1" in found.text and "-5.0" in found.text
    assert found.count("td", **{"class": "up"}) == 3 and found.count("td", **{"class": "down"}) == 1


def test_a_long_log_becomes_a_short_page(tmp_path: Path) -> None:
    steps = 60_000
    with (tmp_path / "log.jsonl").open("w") as file:
        for step in range(steps):
            file.write(
                f'{{"step": {step}, "samples_seen": {8 * step}, "loss": {9.0 if step == 31_234 else 1.0}, "lr": '
                f"0.001}}\n"
            )
    found = write_report(tmp_path, tmp_path / "report.html")
    assert found.stat().st_size < 250_000
    curve = read_log(tmp_path / "log.jsonl").curve("loss")
    assert curve is not None and curve.high is not None and len(curve.x) == 500
    assert max(value for value in curve.high if value is not None) == 9.0  # a spike of one step is still to be seen
    assert curve.x == sorted(curve.x)


def test_what_is_not_a_number_leaves_a_gap_and_a_note(tmp_path: Path) -> None:
    lines = [{"samples_seen": number, "loss": None if number in (3, 4) else 1.0 + number} for number in range(8)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"samples_seen": 9, "lo')
    log = read_log(tmp_path / "log.jsonl")
    curve = log.curve("loss")
    assert curve is not None and curve.y == [1.0, 2.0, 3.0, None, None, 6.0, 7.0, 8.0]
    assert log.odd == {"loss": 2} and log.damaged == 1
    text = page(tmp_path).text
    assert "The loss was not finite at 2 logged steps" in text and "1 lines of log.jsonl could not be read" in text
    drawn = line_chart("Loss", {"loss": curve}, "pairs")
    path = re.search(r'class="line"[^>]* d="([^"]*)"', drawn)
    assert path is not None and path[1].count("M") == 2


def test_time_is_taken_from_the_log(tmp_path: Path) -> None:
    write_log(tmp_path, 4)
    curve = read_log(tmp_path / "log.jsonl").curve("pairs_per_second", "seconds")
    assert curve is not None and curve.x == pytest.approx([0.08, 0.16, 0.24, 0.32])
    by_time = read_log(tmp_path / "log.jsonl").curve("eval.face_top1", "seconds")
    assert by_time is not None and by_time.x == pytest.approx([0.32])


def test_thinning_keeps_means_and_extremes() -> None:
    curve = thin(array("d", range(10)), array("d", [0, 1, 2, 3, math.nan, math.nan, 6, 7, 8, 100]), 5)
    assert curve.y == [0.5, 2.5, None, 6.5, 54.0]
    assert curve.low == [0.0, 2.0, None, 6.0, 8.0] and curve.high == [1.0, 3.0, None, 7.0, 100.0]
    assert curve.x == [0.5, 2.5, 4.5, 6.5, 8.5]


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [0.0, 1.0], [-3.2, 17.0], [1e-9, 2e-9], [5e8, 5.1e8], [-1.0, -1.0], [99.9, 100.0]]
)
def test_linear_ticks_are_round_and_hold_all_values(values: list[float]) -> None:
    axis = linear_axis(values)
    assert axis.low <= min(values) and max(values) <= axis.high * (1 + 1e-12)
    assert 2 <= len(axis.ticks) <= 8
    assert all(0 <= axis.place(value) <= 1 + 1e-9 for value in values)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.3, 12.0], [1e-8, 1e8], [2.0, 4.9], [0.9999, 10.0]])
def test_log_ticks_hold_all_values(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 8


def test_small_pieces() -> None:
    values = (0.0, 0.0015, 5e-4, 12_500.0, 1.2e6, 3.0, -10.5)
    assert [short(value) for value in values] == ["0", "0.0015", "5e-4", "12.5k", "1.2M", "3", "-10.5"]
    inside = json_script("</script><b>").removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in inside and json.loads(inside) == "</script><b>"
    assert line_chart("Nothing", {"a": None, "b": MetricCurve([1.0], [None])}, "pairs") == ""
    assert Axis(1.0, 100.0, True, []).place(10.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("file", "content", "message"), [("evaluation.json", "{", "not readable"), ("gallery.json", "[]", "not a mapping")]
)
def test_mistakes_are_one_clear_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match="no such directory"):
        main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="nothing to report"):
        main([str(tmp_path)])
    write_log(tmp_path, 1)
    with pytest.raises(UserError, match="is a directory: name a file in it"):
        main([str(tmp_path), "--out", str(tmp_path)])
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        main([str(tmp_path)])
