"""One global order whoever reads it: ranks, workers, caches and resumption never change a batch; damage and hangs have
names."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.support.forked_ranks import run_ranks
from tests.support.shards import (
    global_batches,
    loader,
    overwrite,
    picture,
    preprocess,
    same,
    sample,
    take,
    tokenize,
    write_shards,
)
from trainer.core.types import Preprocess, UserError
from trainer.data import DataSettings, SourceSettings, build_loader
from trainer.data.open import open_source
from trainer.data.reader import Reader
from trainer.data.sharded_dataset import hash_caption

BATCH, STEPS = 12, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 samples in three shards and 21 in two, and a copy of the first with damage in it."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "one", [15, 15, 7])
    write_shards(root / "two", [11, 10], first=100)
    write_shards(root / "several", [20, 9], first=200, captions=2)
    write_shards(root / "damaged", [15, 15, 7])
    for shard, row in ((0, 3), (1, 7), (1, 8), (2, 0)):
        overwrite(root / "damaged", shard, row)
    return root


def datasets(root: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    mixture = [SourceSettings(path=str(root / "one"), weight=3), SourceSettings(path=str(root / "two"), weight=1)]
    augment = {"crop_scale": (0.5, 1.0), "flip": 0.5, "randaugment": 1}
    return {
        "plain": (root / "one", {}),
        "mixture": (mixture, {"shuffle": "window", "window": 2}),
        "augmented": (root / "several", {"augment": augment}),
        "damaged": (root / "damaged", {}),
    }


@pytest.mark.parametrize("name", ["plain", "mixture", "augmented", "damaged"])
def test_world_and_workers_do_not_change_the_global_batches(shards: Path, name: str) -> None:
    train, settings = datasets(shards)[name]
    reference = global_batches(train, STEPS, world=1, cache_decoded=0, **settings)
    assert len({tuple(batch.ids.tolist()) for batch in reference}) == STEPS
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            assert same(global_batches(train, STEPS, world, workers=workers, cache_decoded=0, **settings), reference), (
                world,
                workers,
            )


@pytest.mark.parametrize("name", ["plain", "mixture", "damaged"])
def test_the_decoded_cache_changes_nothing(shards: Path, name: str) -> None:
    train, settings = datasets(shards)[name]
    assert same(
        global_batches(train, 9, world=2, **settings), global_batches(train, 9, world=1, cache_decoded=0, **settings)
    )


def test_the_decoded_cache_draws_the_same_captions(shards: Path) -> None:
    batches = global_batches(shards / "several", 9, world=1)
    assert same(batches, global_batches(shards / "several", 9, world=1, cache_decoded=0))
    texts = {tuple(row) for batch in batches for row in batch.tokens.tolist()}
    assert len(texts) > 40, "58 captions of 29 samples, 108 draws"


@pytest.mark.parametrize("seen", [12, 36, 37, 111, 12_345])
def test_a_run_resumes_anywhere_at_any_world_size(shards: Path, seen: int) -> None:
    train, settings = datasets(shards)["augmented"]
    steps = 3
    with loader(train, batch=1, seen=seen, **settings) as single:  # pair by pair: the slowest way to read
        pairs = [next(single) for _ in range(BATCH * steps)]
    for world in (1, 4):
        resumed = global_batches(train, steps, world, seen=seen, workers=2, **settings)
        assert torch.equal(torch.cat([batch.pixels for batch in resumed]), torch.cat([pair.pixels for pair in pairs]))
        assert torch.equal(torch.cat([batch.ids for batch in resumed]), torch.cat([pair.ids for pair in pairs]))


def test_samples_seen_counts_what_was_handed_out(shards: Path) -> None:
    with loader(shards / "one", seen=100, world=2) as source:
        next(source)
        next(source)
        assert source.samples_seen == 124


def test_a_batch_holds_what_the_shards_hold(shards: Path) -> None:
    batch = take(loader(shards / "one", batch=37), 1)[0]
    assert sorted(batch.ids.tolist()) == list(range(37))
    assert [field.dtype for field in batch[:5]] == [torch.uint8, torch.int64, torch.bool, torch.int64, torch.int64]
    assert batch.taught.shape == (37, 0)  # no stored teacher
    for row, number in enumerate(batch.ids.tolist()):
        assert np.array_equal(batch.pixels[row].permute(1, 2, 0).numpy(), np.asarray(picture(number)))
        assert torch.equal(batch.tokens[row], tokenize([f"caption {number}"])[0][0])
        assert batch.groups[row] == hash_caption(f"caption {number}")


def test_captions_come_from_the_fields_asked_for(shards: Path) -> None:
    def texts(caption: Any) -> set[int]:
        batches = take(loader(shards / "one", batch=37, caption=caption), 3)
        return {int(group) for batch in batches for group in batch.groups}

    titles = {hash_caption(f"title {number}") for number in range(37)}
    assert texts("title") == titles
    both = texts(["title", "captions"])
    assert both & titles and both - titles
    with pytest.raises(UserError, match=r"samples in a row cannot be used.*no caption in nothing"):
        texts("nothing")


def test_captions_may_lie_in_a_column_beside_the_tars(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [6, 4])
    texts = [f"recaption {number}" for number in range(9)] + [""]
    (folder / "columns").mkdir()
    np.save(folder / "columns" / "better.npy", np.cumsum([0] + [len(text) for text in texts]))
    np.save(folder / "columns" / "better.text.npy", np.frombuffer("".join(texts).encode(), np.uint8))
    np.save(folder / "columns" / "score.npy", np.zeros(10))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["columns"] = {
        "better": {"file": "columns/better.npy", "text": "columns/better.text.npy"},
        "score": {"file": "columns/score.npy"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with loader(folder, batch=10, caption="better") as source:
        batch = next(source)
        expected = [hash_caption(texts[number]) for number in batch.ids]
        assert batch.groups.tolist() == expected
        assert source.skipped.reasons == {"no caption in better": source.skipped.count}
    both = take(loader(folder, batch=10, caption=["better", "txt"]), 4)
    words = {int(group) for batch in both for group in batch.groups}
    assert hash_caption("recaption 3") in words and hash_caption("caption 9") in words
    with pytest.raises(UserError, match="joined column 'score' holds numbers"):
        loader(folder, caption="score")


def test_ids_go_on_over_the_sources(shards: Path) -> None:
    mixture = [SourceSettings(path=str(shards / "one")), SourceSettings(path=str(shards / "two"), upsample=2)]
    batch = take(loader(mixture, batch=79), 1)[0]
    counts = np.bincount(batch.ids.numpy())
    assert counts.tolist() == [1] * 37 + [2] * 21
    row = batch.ids.tolist().index(40)
    assert np.array_equal(batch.pixels[row].permute(1, 2, 0).numpy(), np.asarray(picture(103)))


@pytest.mark.parametrize("settings", [{"workers": 0, "cache_decoded": 0}, {"workers": 2, "cache_decoded": 0}, {}])
def test_damaged_samples_are_replaced_counted_and_named(shards: Path, settings: dict[str, Any]) -> None:
    with loader(shards / "damaged", batch=37, **settings) as source:
        batches = [next(source) for _ in range(3)]
        skipped = source.skipped
    assert skipped.count >= 12
    assert skipped.reasons == {"image bytes differ from the index": skipped.count}
    assert sorted(key.rpartition("/")[2] for key in skipped.keys) == [
        "00000.tar:000003", "00001.tar:000022", "00001.tar:000023", "00002.tar:000030",
    ]  # fmt: skip
    assert all(batch.rows == 37 and not set(batch.ids.tolist()) & {3, 22, 23, 30} for batch in batches)


def test_damage_that_no_digest_shows_is_found_by_decoding(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [6, 6])
    overwrite(tmp_path / "shards", 0, 2)
    with loader(tmp_path / "shards", check_digests=False) as source:
        for _ in range(4):
            next(source)
        assert [key.rpartition("/")[2] for key in source.skipped.keys] == ["00000.tar:000002"]
        assert "not decodable" in next(iter(source.skipped.reasons))


def test_a_shard_cut_short_costs_its_samples_alone(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [10, 10])
    tar = tmp_path / "shards" / "00001.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    with loader(tmp_path / "shards", batch=20) as source:
        ids = {int(number) for _ in range(3) for number in next(source).ids}
        assert set(range(10)) <= ids and len(ids) < 20
        assert any("cut" in reason for reason in source.skipped.reasons)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_without_any_whole_sample_ends_the_run(tmp_path: Path, workers: int) -> None:
    def empty_caption(number: int) -> dict[str, bytes]:
        return {**sample(number), "txt": b"  "}

    write_shards(tmp_path / "shards", [5], make=empty_caption)
    with pytest.raises(UserError, match=r"samples in a row cannot be used.*00000.tar:00000\d: empty caption; .*verify"):
        take(loader(tmp_path / "shards", workers=workers, cache_decoded=0), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_named(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards", [5, 5])
    (tmp_path / "shards" / "00001.tar").rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"00001\.tar: no such shard; copy it there"):
        loader(tmp_path / "shards")
    (tmp_path / "kept").rename(tmp_path / "shards" / "00001.tar")

    def open_and_lose(*args: Any) -> Any:
        source = open_source(*args)
        (tmp_path / "shards" / "00001.tar").unlink()
        return source

    monkeypatch.setattr("trainer.data.loader.open_source", open_and_lose)
    with pytest.raises(UserError, match=r"00001\.tar: no such shard"):
        take(loader(tmp_path / "shards", workers=workers, batch=2, cache_decoded=0), 10)


def test_batches_must_divide_by_ranks(shards: Path) -> None:
    with pytest.raises(UserError, match=r"batch.size 10 does not divide by 4 ranks; the nearest that do are 8 or 12"):
        loader(shards / "one", batch=10, world=4)
    with pytest.raises(UserError, match="nearest that do are 4"):
        loader(shards / "one", batch=3, world=4)


def test_a_relative_path_is_taken_from_where_one_stands(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(loader(shards / "one"), 1)
    for folder, path in ((shards, "one"), (shards / "one", ".")):
        monkeypatch.chdir(folder)
        assert same(take(loader(path), 1), expected)


def test_an_empty_path_and_a_wrong_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset given"):
        loader("")
    with pytest.raises(UserError, match="an empty list"):
        loader([])
    with pytest.raises(UserError, match="no-such-folder: no such file"):
        loader(tmp_path / "no-such-folder")
    with pytest.raises(UserError, match="has no samples"):
        loader(write_shards(tmp_path / "empty", [0]))


class Slow(Reader):
    """Hangs, or dies, at one position."""

    at: int = 30
    how: str = "hang"

    def fill(self, positions: Any, rows: Any) -> Any:
        if self.at in positions:
            time.sleep(4) if self.how == "hang" else os.kill(os.getpid(), signal.SIGKILL)
        return super().fill(positions, rows)


def slow_loader(shards: Path, monkeypatch: pytest.MonkeyPatch, how: str, **settings: Any) -> Any:
    monkeypatch.setattr("trainer.data.loader.Reader", Slow)
    monkeypatch.setattr(Slow, "how", how)
    return loader(shards / "one", cache_decoded=0, stall_seconds=1.5, **settings)


def test_a_stalled_worker_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"data worker \d \(pid \d+\) has been silent for 1.5 s while reading .*\.tar"
    with slow_loader(shards, monkeypatch, "hang", workers=2) as source, pytest.raises(UserError, match=said):
        for _ in range(4):
            next(source)


def test_a_stalled_thread_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = slow_loader(shards, monkeypatch, "hang", workers=0)
    with pytest.raises(UserError, match=r"the loader has been silent for 1.5 s while reading .*\.tar"):
        for _ in range(4):
            next(source)


def test_a_killed_worker_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_loader(shards, monkeypatch, "die", workers=2) as source:
        for _ in range(2):  # the second asker gets the same answer
            with pytest.raises(
                UserError, match=r"data worker \d was killed by SIGKILL while reading .*\.tar.*lower data.workers"
            ):
                for _ in range(4):
                    next(source)


def test_a_slow_consumer_is_not_a_stall(shards: Path) -> None:
    with loader(shards / "one", workers=2, stall_seconds=1.5, cache_decoded=0) as source:
        next(source)
        time.sleep(2)
        for _ in range(8):
            next(source)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_closing_and_forgetting_end_workers_and_thread(shards: Path) -> None:
    before, threads = children(), set(threading.enumerate())
    with loader(shards / "one", workers=2, cache_decoded=0) as source:
        next(source)
        assert len(children() - before) == 2
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(source)
    forgotten = loader(shards / "one", workers=2, cache_decoded=0)
    next(forgotten)
    del forgotten
    gc.collect()
    assert children() == before
    assert not set(threading.enumerate()) - threads


def test_waiting_is_measured(shards: Path) -> None:
    with loader(shards / "one") as source:
        next(source)
        time.sleep(1.5)
        before = source.wait_seconds
        next(source)
        assert source.wait_seconds - before < 0.75, "the batch was made while the consumer slept"


def test_loaders_run_in_forked_ranks_with_workers(shards: Path) -> None:
    def read() -> list[int]:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return [
            int(number)
            for batch in take(loader(shards / "one", rank=rank, world=world, workers=2), 2)
            for number in batch.ids
        ]

    first, second = run_ranks(read, 2)
    whole = [batch.ids.tolist() for batch in global_batches(shards / "one", 2, world=1)]
    assert [first[:6] + second[:6], first[6:] + second[6:]] == whole


def test_vocabularies_beyond_16_bits_survive_the_cache(shards: Path) -> None:
    def far(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = tokenize(captions)
        return torch.where(tokens % 2 == 0, tokens, tokens + 200_000), mask

    prep = Preprocess((8, 8), "squash", "bicubic", (0.5,) * 3, (0.5,) * 3, 6, far)
    cached, plain = (take(loader(shards / "one", prep=prep, cache_decoded=size), 5) for size in (1.0, 0.0))
    assert same(cached, plain)
    assert max(int(batch.tokens.max()) for batch in plain) > 200_000


def test_auto_workers_are_none_once_pictures_fit_memory(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_loader(DataSettings(train=str(shards / "one")), preprocess(), 12, 0, 1, 0, 0).close()
    assert "0 workers per rank, kept decoded in memory" in capfd.readouterr().err
