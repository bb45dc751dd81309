"""Several runs on one page: curves in one colour a run, results side by side, where recipes differ, hostile names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.browser import Browser, needs_chromium
from tests.test_report import EVIL, Page, evaluation, write_log
from trainer.config import Recipe
from trainer.core.settings import parse
from trainer.core.types import UserError
from trainer.report import main, write_comparison

RECIPE: dict[str, Any] = {
    "run": {"samples": 96, "directory": "runs/x"},
    "model": {"config": {"model_type": "siglip"}, "lora": None},
    "data": {"train": "shards", "workers": 2},
    "loss": {"name": "sigmoid"},
    "batch": {"size": 8},
    "optim": {"lr": 0.001},
}


def make_run(folder: Path, recipe: dict[str, Any], score: float | None = None, **more: Any) -> Path:
    folder.mkdir(parents=True)
    write_log(folder, 12, **more)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if score is not None:
        found = evaluation()
        found["metrics"]["image_to_text_r1"] = score
        (folder / "evaluation.json").write_text(json.dumps(found))
    starts = [
        {"time": "2026-01-01", "git": f"revision of {folder.name}", "packages": {"torch": "2.13.0"}, "hosts": {"a": 2}}
    ]
    (folder / "environment.json").write_text(json.dumps({"starts": starts}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    other = RECIPE | {"loss": {"name": "softmax"}, "optim": {"lr": 0.002}, "data": {"train": "shards", "workers": 4}}
    return [
        make_run(tmp_path / "a", RECIPE, 0.5),
        make_run(tmp_path / "b", other, 0.75),
        make_run(tmp_path / "c", RECIPE | {"model": {"config": {"model_type": "siglip"}, "lora": {"rank": 8}}}),
    ]


def rows(page: str) -> dict[str, list[str]]:
    """First cell -> the texts of the others, of all tables."""
    found = {}
    for line in page.split("<tr>")[1:]:
        cells = [Page(f"<p>{cell.split('>', 1)[1].split('</td>')[0]}</p>").text for cell in line.split("<td")[1:]]
        if cells:
            found[cells[0]] = cells[1:]
    return found


def compare(runs: list[Path], out: Path) -> tuple[str, Page, dict[str, list[str]]]:
    text = write_comparison(runs, out).read_text(encoding="utf-8")
    return text, Page(text), rows(text)


def test_results_and_differences_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    text, page, table = compare(runs, tmp_path / "page.html")
    assert table["image to caption R@1"] == ["50.0% ± 1.3", "75.0% ± 1.3", ""]
    assert "<b>75.0%</b>" in text and "<b>50.0%</b>" not in text, "the best of a line is bold"
    assert table["loss.name"] == ["sigmoid", "softmax", "sigmoid"]
    assert table["optim.lr"] == ["0.001", "0.002", "0.001"]
    assert table["model.lora"] == ["null", "null", "{rank: 8}"]
    assert table["global batch"] == ["8", "8", "8"] and "batch.size" not in table
    assert table["sources"] == ["revision of a", "revision of b", "revision of c"] and "torch" not in table
    assert "are not comparable; the scores are" in page.text and "c is not evaluated yet" in page.text
    head, details = text.split("<details>")[0], text.split("<details>")[1]
    assert "data.workers" not in head and "data.workers" in details, "what only costs is folded away"


def test_a_run_has_one_colour_in_every_chart(runs: list[Path], tmp_path: Path) -> None:
    """The second run has no held-out scores: the third keeps its own colour there."""
    lines = [line for line in (runs[1] / "log.jsonl").read_text().splitlines() if "eval" not in line]
    (runs[1] / "log.jsonl").write_text("\n".join(lines))
    text, _, _ = compare(runs, tmp_path / "page.html")
    charts = [json.loads(part.split("</script>")[0]) for part in text.split('<script type="application/json">')[1:]]
    found = {(series["name"], series["colour"]) for chart in charts for series in chart["series"]}
    assert found == {("a", "a"), ("b", "b"), ("c", "c")}
    assert [[series["name"] for series in chart["series"]] for chart in charts][:2] == [["a", "b", "c"], ["a", "c"]]


def test_names_that_are_alike_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "other" / "a")
    _, page, _ = compare([runs[0], tmp_path / "other" / "a"], tmp_path / "page.html")
    assert f"{tmp_path.name}/a" in page.text and "other/a" in page.text


def test_hostile_names_and_values_are_text(tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    first = make_run(tmp_path / name, RECIPE | {"loss": {"name": EVIL}}, 0.5)
    text, page, table = compare([first, make_run(tmp_path / "b", RECIPE, 0.5)], tmp_path / "page.html")
    assert "<script>alert" not in text and page.count("script") == text.count("<script")
    assert name in page.text and table["loss.name"][0].strip("'").replace("''", "'") == EVIL


def test_what_is_broken_is_said_and_the_rest_shown(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "recipe.yaml").write_text("loss: {name: [")
    _, page, table = compare(runs, tmp_path / "page.html")
    assert "b: its recipe.yaml cannot be read" in page.text and "not readable as YAML" in page.text
    assert table["state"] == ["finished", "broken", "finished"]
    assert table["model.lora"] == ["null", "{rank: 8}"], "a and c are compared all the same"


def test_the_command_writes_it_beside_the_first(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run) for run in runs]) == 0
    assert (tmp_path / "comparison.html").is_file() and "open it in a browser" in capsys.readouterr().out
    with pytest.raises(UserError, match="at most 8"):
        main([str(runs[0])] * 9)
    with pytest.raises(UserError, match="nothing: no such directory"):
        main([str(runs[0]), str(tmp_path / "nothing")])


@needs_chromium
@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_a_screen_and_shows_values_at_a_touch(runs: list[Path], tmp_path: Path, width: int) -> None:
    out = write_comparison(runs, tmp_path / "page.html")
    with Browser(width, 900) as browser:
        browser.open(f"file://{out}")
        assert browser.run("document.documentElement.scrollWidth") == width
        browser.click(".chart .frame")
        browser.wait("document.querySelectorAll('.tip div').length == 3")
        assert browser.run("[...document.querySelectorAll('.tip div')].map(d => d.textContent[0]).join('')") == "abc"
        assert browser.errors == []


def test_a_key_that_an_older_version_did_not_have_is_no_difference(tmp_path: Path) -> None:
    whole = parse(Recipe, RECIPE | {"model": {"path": "google/siglip-base-patch16-224"}}, "recipe").model_dump(
        mode="json"
    )
    older = {**whole, "optim": {key: value for key, value in whole["optim"].items() if key != "weight_decay"}}
    pair = [make_run(tmp_path / "a", whole), make_run(tmp_path / "b", older)]
    _, page, _ = compare(pair, tmp_path / "page.html")
    assert "The recipes do not differ in anything" in page.text
