"""data.where: the order over the selected samples is the same for any ranks, workers, cache and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.format.index import Dataset
from data_tools.format.view import write_column
from data_tools.io.output import Output
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, curve, make_shards, mistake, stopped_at_step
from tests.support.shards import global_batches, loader, overwrite, same, take, write_shards
from tests.support.tiny_models import tiny_captions, tiny_model
from trainer.core.types import UserError
from trainer.data import SourceSettings
from trainer.data.captions import sample_captions
from trainer.data.selection import Selection
from trainer.data.settings import DataSettings
from trainer.runtime.signals import EXIT_AGAIN

SHARDS = [15, 2, 20]
WHERE = "score > 0.5 and kind != 'bad'"


def add_columns(folder: Path, **columns: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    output = Output(str(folder))
    output.start()
    made = {name: write_column(output, name, values) for name, values in columns.items()}
    output.finish()
    manifest["columns"] = {**manifest.get("columns", {}), **made}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def scores(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.random.default_rng(count).random(count).astype(np.float32)
    values[3] = np.nan
    values[15:17] = 0  # a shard of which nothing is left
    return values


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shards(tmp_path_factory.mktemp("where") / "one", SHARDS)
    kinds = ["bad" if number % 9 == 0 else "" if number == 4 else "good" for number in range(sum(SHARDS))]
    add_columns(folder, score=scores(sum(SHARDS)), kind=kinds, vector=np.zeros((sum(SHARDS), 2)))
    write_shards(folder.parent / "two", [11, 10], first=100)
    overwrite(folder, 0, kept(folder)[0])
    return folder


def kept(folder: Path) -> list[int]:
    return [n for n, score in enumerate(scores(sum(SHARDS))) if score > 0.5 and n % 9 and n != 4]


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_every_epoch_draws_each_selected_sample_once(shards: Path, shuffle: str) -> None:
    wanted = kept(shards)
    assert 5 < len(wanted) < 25
    with loader(shards, where=WHERE, shuffle=shuffle, window=2, check_digests=False) as source:
        order = source.reader.order
    assert order.epoch == len(wanted)
    epochs = [order(np.arange(order.epoch) + epoch * order.epoch)[1] for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == wanted for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("shuffle", ["full", "window"])
@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_workers_cache_and_resumption_change_nothing(shards: Path, shuffle: str, mixed: bool) -> None:
    mixture = [
        SourceSettings(path=str(shards), where=WHERE, upsample=1.5),
        SourceSettings(path=str(shards.parent / "two"), where="", upsample=1.0),
    ]
    train, settings = (mixture if mixed else shards), {"where": "" if mixed else WHERE, "shuffle": shuffle, "window": 2}
    reference = global_batches(train, 6, world=1, cache_decoded=0, **settings)
    for world, workers in ((1, 2), (2, 0), (4, 3)):
        found = global_batches(train, 6, world, workers=workers, cache_decoded=0, **settings)
        assert same(found, reference), (world, workers)
    assert same(global_batches(train, 6, world=2, **settings), reference)
    assert same(global_batches(train, 4, world=3, seen=24, workers=1, cache_decoded=0, **settings), reference[2:])
    drawn = set(torch.cat([batch.ids for batch in reference]).tolist())
    assert {number for number in drawn if number < sum(SHARDS)} <= set(kept(shards)), "replacements too"


def test_a_condition_that_all_samples_meet_changes_nothing(shards: Path) -> None:
    everything = take(loader(shards, where="caption_bytes >= 1"), 5)
    assert same(everything, take(loader(shards), 5))


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
def test_the_selected_are_found_by_number(tmp_path: Path, count: int) -> None:
    keep = np.random.default_rng(count).random(count) < 0.3
    keep[-1] = True
    folder = write_shards(tmp_path / "x", [1])  # its index is not read for a side-car column
    manifest = json.loads((folder / "manifest.json").read_text())
    sizes = [count] if count < 3 else [count // 3, 0, count - count // 3]
    manifest["shards"] = [{"name": f"{n}.tar", "samples": size} for n, size in enumerate(sizes)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    add_columns(folder, keep=keep)
    selection = Selection(Dataset.open(folder), "keep == 1")
    numbers = np.random.default_rng(0).permutation(selection.size)
    assert np.array_equal(selection.samples(np.zeros_like(numbers), numbers), np.flatnonzero(keep)[numbers])
    edges = np.cumsum([0, *sizes])
    assert selection.starts(0).tolist() == [int(keep[:edge].sum()) for edge in edges]
    other = keep.copy()
    other[:1] ^= True
    if count > 1:
        add_columns(folder, keep=other)
        assert Selection(Dataset.open(folder), "keep == 1").digest != selection.digest


def test_the_survey_of_captions_sees_the_selected_alone(shards: Path) -> None:
    found = sample_captions(DataSettings(train=str(shards), where=WHERE), 1000)
    assert sorted(found) == sorted(f"caption {number}" for number in kept(shards))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (
            "scor > 1",
            r"data.where: no column 'scor' beside .*one, perhaps 'score'; there are: kind, score, vector, wid",
        ),
        ("number > 1", "no column 'number'.*`python -m data_tools filter` also reads values in the .json members"),
        ("score > 2", "data.where: no sample of .*one meets 'score > 2'"),
        ("vector > 2", r"side-car column 'vector' has \(2,\) numbers per sample"),
        ("kind > 2", "the column 'kind' holds texts"),
        ("score == 'x'", "the column 'score' holds numbers"),
    ],
)
def test_a_mistake_is_one_clear_line(shards: Path, where: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        loader(shards, where=where)
    assert "\n" not in str(caught.value)


def test_a_column_or_an_index_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "short", [6, 4])
    add_columns(folder, score=np.ones(9), lost=np.ones(10))
    (folder / "columns" / "lost.npy").unlink()
    with pytest.raises(UserError, match="side-car column 'score' has 9 values for 10 samples; write it again"):
        loader(folder, where="score > 0")
    with pytest.raises(UserError, match=r"lost.npy: no such file, but manifest.json names it"):
        loader(folder, where="lost > 0")
    (folder / "00000.idx").write_bytes((folder / "00001.idx").read_bytes())
    with pytest.raises(UserError, match=r"00000.idx: .* rows, but the manifest says 6"):
        loader(folder, where="width > 0")


def test_a_run_resumes_with_the_same_selection_only(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "pairs", tiny_captions(60))
    add_columns(folder, score=np.arange(60) / 60)
    tiny_model("siglip").save_pretrained(tmp_path / "base")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run: {{samples: 96}}\nmodel: {{path: {tmp_path / 'base'}}}\nbatch: {{size: 16}}\n"
        f"data: {{train: {folder}, workers: 0, where: score > 0.4}}\nengine: {{precision: fp32}}\n"
        "log: {every: 1, line_seconds: 1000}\ncheckpoint: {every: 48}\n"
    )
    assert run_ranks(call, 1, recipe, f"run.directory={tmp_path / 'whole'}") == [0]
    run = f"run.directory={tmp_path / 'parts'}"
    stop = ("batch.micro_batch=4", run)
    assert run_ranks(stopped_at_step, 2, 3, recipe, *stop) == [EXIT_AGAIN] * 2
    kept = (tmp_path / "parts" / "recipe.yaml").read_text()
    [text] = run_ranks(mistake, 1, recipe, run, "data.where=score > 0.5")
    assert "data.where selects other samples than" in text and "checkpoint.resume=" in text and "\n" not in text
    assert (tmp_path / "parts" / "recipe.yaml").read_text() == kept
    assert run_ranks(call, 1, recipe, run) == [0]
    one, other = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert np.allclose(np.array(one)[3:], np.array(other)[-3:], rtol=1e-4)
