"""Folders, patterns, tars without an index, remote shards behind a small cache, and tars that were tampered with."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.shards import (
    Members,
    encode,
    global_batches,
    loader,
    picture,
    preprocess,
    same,
    sample,
    take,
    write_shards,
    write_tar,
)
from trainer.core.types import RunFailed, UserError
from trainer.data import DataSettings, SourceSettings
from trainer.data.open import open_source
from trainer.data.reader import Reader, Rows
from trainer.data.remote import FetchAhead, ShardCache
from trainer.evals.examples import open_examples

numbers = itertools.count()


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache")}


def test_tars_without_an_index_give_the_same_batches(
    tmp_path: Path, cache: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "bare", [9, 8], index=False)
    indexed = global_batches(write_shards(tmp_path / "indexed", [9, 8]), 4, world=2)
    for _ in range(2):
        assert same(global_batches(tmp_path / "bare", 4, world=2, **cache), indexed)
    assert capfd.readouterr().err.count("has no index: building one for 2 tars by reading each tar once") == 1
    (tmp_path / "bare" / "00001.tar").unlink()
    write_tar(tmp_path / "bare" / "00001.tar", {"x": sample(77)})  # another file under the same name: scanned again
    assert len(take(loader(tmp_path / "bare", batch=10, **cache), 1)[0].ids.unique()) == 10


@pytest.mark.parametrize("pattern", ["{00000..00002}.tar", "0000{0,1,2}.tar", "*.tar"])
def test_patterns_name_tars(tmp_path: Path, cache: dict[str, Any], pattern: str) -> None:
    write_shards(tmp_path / "bare", [3, 4, 5], index=False)
    batch = take(loader(f"{tmp_path}/bare/{pattern}", **cache), 1)[0]
    assert sorted(batch.ids.tolist()) == list(range(12))


def test_a_missing_tar_of_a_pattern_is_named(tmp_path: Path, cache: dict[str, Any]) -> None:
    write_shards(tmp_path / "bare", [3], index=False)
    with pytest.raises(UserError, match=r"00001\.tar: no such file"):
        loader(f"{tmp_path}/bare/{{00000..00001}}.tar", **cache)


def test_problems_in_tars_of_others_are_said(
    tmp_path: Path, cache: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    partial: Members = {"png": encode(picture(1))}
    write_tar(tmp_path / "some.tar", {"a": sample(0), "b": partial, "c": sample(2)})
    assert sorted(take(loader(tmp_path / "some.tar", batch=2, **cache), 1)[0].ids.tolist()) == [0, 1]
    assert "its tars have problems, only their complete samples are used: missing_text 1" in capfd.readouterr().err


def test_names_that_leave_the_folder_and_links_are_not_followed(tmp_path: Path, cache: dict[str, Any]) -> None:
    (tmp_path / "bare").mkdir()
    with tarfile.open(tmp_path / "bare" / "0.tar", "w") as tar:
        for name in ("../../escape", "/absolute", "good"):
            for extension, data in sample(3).items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert take(loader(tmp_path / "bare", batch=3, **cache), 1)[0].ids.tolist() == [0, 0, 0]


def test_an_empty_folder_and_a_missing_index_say_what_to_do(tmp_path: Path, cache: dict[str, Any]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no manifest.json and no .tar there; make shards"):
        loader(tmp_path / "empty", **cache)
    shards = write_shards(tmp_path / "shards", [5, 5])
    (shards / "00001.idx").unlink()
    with pytest.raises(UserError, match=r"00001\.idx: no such file; .*data_tools index"):
        take(loader(shards, **cache), 1)
    (shards / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: not readable as JSON"):
        loader(shards, **cache)


def remote_copy(folder: Path) -> str:
    """The folder's files in fsspec's memory file system."""
    root = f"/remote{next(numbers)}"
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"{root}/{file.name}", file.read_bytes())
    return f"memory:/{root}"


def cached_bytes(cache: dict[str, Any]) -> int:
    return sum(file.stat().st_size for file in Path(cache["cache_dir"], "shards").glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_batches_of_local_ones_through_a_small_cache(
    tmp_path: Path, cache: dict[str, Any], workers: int
) -> None:
    folder = write_shards(tmp_path / "local", [6] * 8)
    one = (folder / "00000.tar").stat().st_size
    limit = {"cache_limit": 4.5 * one / 2**30, "window": 2, "cache_decoded": 0}
    local = global_batches(folder, 12, world=2, shuffle="window", **limit)
    url = remote_copy(folder)
    assert same(global_batches(url, 12, world=2, workers=workers, **limit, **cache), local)
    assert cached_bytes(cache) <= 4.5 * one


def test_remote_tars_without_an_index_are_fetched_and_indexed_once(
    tmp_path: Path, cache: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "bare", [6, 6], index=False)
    url = remote_copy(folder)
    batch = take(loader(f"{url}/{{00000..00001}}.tar", **cache), 1)[0]
    assert sorted(batch.ids.tolist()) == list(range(12))
    assert "fetching and reading each tar once" in capfd.readouterr().err
    assert same(take(loader(url, **cache), 1), [batch])


@pytest.mark.parametrize("told", [True, False])
def test_a_cache_too_small_for_remote_tars_without_an_index_is_refused(
    tmp_path: Path, cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Also where the server does not tell sizes, and when the indexes are there already."""
    folder = write_shards(tmp_path / "bare", [6] * 6, index=False)
    one = (folder / "00000.tar").stat().st_size
    url = remote_copy(folder)
    if not told:
        memory = type(fsspec.filesystem("memory"))
        info = memory.info
        monkeypatch.setattr(memory, "info", lambda self, path, **options: {**info(self, path, **options), "size": None})
    for _ in range(2):
        with pytest.raises(UserError, match=r"data.cache_limit: .* is less than two windows of 2 shards"):
            loader(url, window=2, cache_limit=2.5 * one / 2**30, **cache)
    assert len(take(loader(url, window=2, cache_limit=4.5 * one / 2**30, **cache), 1)[0].ids) == 12


def test_evaluation_reads_remote_shards(tmp_path: Path, cache: dict[str, Any]) -> None:
    url = remote_copy(write_shards(tmp_path / "local", [4, 3]))
    examples = open_examples(url, DataSettings(**cache))
    assert [examples.read(number).metadata["number"] for number in range(examples.size)] == list(range(7))


def test_remote_mistakes_are_named(tmp_path: Path, cache: dict[str, Any]) -> None:
    folder = write_shards(tmp_path / "local", [6] * 4)
    url = remote_copy(folder)
    with pytest.raises(UserError, match=r"data.cache_limit: .* is less than two windows of 2 shards"):
        loader(url, window=2, cache_limit=1e-9, **cache)
    fsspec.filesystem("memory").rm_file(f"{url.removeprefix('memory:/')}/00002.tar")
    with pytest.raises(UserError, match=r"00002\.tar: no such file; upload it"):
        take(loader(url, batch=24, **cache), 1)
    with pytest.raises(UserError, match=r"no manifest.json and no .tar there"):
        loader("memory://nowhere", **cache)
    with pytest.raises(UserError, match=r"00007\.tar: no such file; upload it"):
        loader(f"{url}/{{00000,00007}}.tar", **cache)


class Dropped(Exception):
    """What a backend raises: no OSError, as those of aiohttp, botocore and gcsfs are none."""


class DroppingFile(io.BytesIO):
    """A file whose first piece arrives; then the connection is dropped, as often as its file system is told."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() and Dropping.drops > 0:
            Dropping.drops -= 1
            raise Dropped("connection lost\nin the middle")
        return super().read(min(size, 100) if size and size > 0 else size)


class Dropping(MemoryFileSystem):
    """The memory file system behind a bad line. Each process counts for itself."""

    protocol = "dropping"
    drops = 0
    refused = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("dropping://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = DroppingFile(super()._open(path, "rb").getvalue())
        file.size = len(file.getvalue())  # type: ignore[attr-defined]
        return file

    def exists(self, path: str, **options: Any) -> bool:
        if Dropping.refused > 0:
            Dropping.refused -= 1
            raise Dropped("refused")
        return bool(super().exists(path, **options))


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> type[Dropping]:
    fsspec.register_implementation("dropping", Dropping, clobber=True)
    monkeypatch.setattr(Dropping, "drops", 0)
    monkeypatch.setattr(Dropping, "refused", 0)
    init = ShardCache.__init__
    monkeypatch.setattr(
        ShardCache, "__init__", lambda self, folder, limit: init(self, folder, limit, retry_seconds=0.01)
    )
    return Dropping


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_connections_of_any_kind_are_tried_again_and_then_named(
    tmp_path: Path, cache: dict[str, Any], dropping: type[Dropping], workers: int
) -> None:
    folder = write_shards(tmp_path / "local", [6] * 4)
    url = remote_copy(folder).replace("memory:", "dropping:")
    how = {"window": 2, "workers": workers, "cache_decoded": 0}
    dropping.refused = 2
    with loader(url, **how, **cache) as source:
        dropping.drops = 2
        assert same(
            [next(source), next(source)],
            global_batches(folder, 2, world=1, shuffle="window", window=2, cache_decoded=0),
        )
    dropping.drops = 10**6  # before the workers are forked
    expected = r"^dropping:/.*\.(tar|idx): not fetched in 3 attempts \(Dropped: connection lost in the middle\); check network and credentials$"
    with pytest.raises(RunFailed, match=expected):
        take(loader(url, **how, cache_dir=str(tmp_path / "third")), 1)
    dropping.drops, dropping.refused = 0, 10**6
    with pytest.raises(RunFailed, match=r"^dropping:/.*: not fetched in 3 attempts \(Dropped: refused\)"):
        loader(url, **how, **cache)


def test_what_ends_the_thread_that_fetches_ahead_is_raised_to_who_asks() -> None:
    def broken(url: str) -> str:
        raise KeyError(url)

    ahead = FetchAhead(broken)
    ahead.want(["a"])
    ahead.thread.join(5)
    assert not ahead.thread.is_alive()
    with pytest.raises(KeyError, match="a"):
        ahead.want(["b"])


def test_a_fetch_that_fails_is_tried_again_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def broken(url: str, mode: str) -> Any:
        calls.append(url)
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr("trainer.data.remote.fsspec.open", broken)
    with pytest.raises(
        UserError, match=r"s3://b/0.tar: not fetched in 3 attempts \(ConnectionResetError: connection reset\)"
    ):
        ShardCache(str(tmp_path), 1000, retry_seconds=0.01).fetch("s3://b/0.tar")
    assert len(calls) == 3


def test_the_least_recently_used_shard_goes_first_and_stays_readable(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in "abc":
        memory.pipe_file(f"/lru/{name}.tar", name.encode() * 100)
    cache = ShardCache(str(tmp_path), limit=250)
    first = cache.fetch("memory://lru/a.tar")
    os.utime(first, ns=(1, 1))
    second = cache.fetch("memory://lru/b.tar")
    os.utime(second, ns=(2, 2))
    with open(second, "rb") as reading:
        cache.fetch("memory://lru/a.tar")  # used again: now b is the oldest
        third = cache.fetch("memory://lru/c.tar")
        assert os.path.exists(first) and os.path.exists(third) and not os.path.exists(second)
        assert reading.read() == b"b" * 100
    with pytest.raises(UserError, match=r"exceed data.cache_limit"):
        ShardCache(str(tmp_path / "tiny"), limit=50).fetch("memory://lru/a.tar")


def test_what_a_killed_process_left_half_fetched_is_swept(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in "de":
        memory.pipe_file(f"/sweep/{name}.tar", name.encode() * 100)
    cache = ShardCache(str(tmp_path), limit=1000)
    stale, current = (tmp_path / "shards" / f"{name}.tar.part" for name in ("stale", "current"))
    stale.write_bytes(b"half")
    current.write_bytes(b"half")
    cache.fetch("memory://sweep/d.tar")
    assert not stale.exists() and not current.exists()
    current.write_bytes(b"half")
    with cache.lock("current.tar"):
        cache.fetch("memory://sweep/e.tar")
        assert current.exists()


def test_fetching_ahead_prefers_what_was_asked_for_last() -> None:
    fetched: list[str] = []
    ahead = FetchAhead(lambda url: fetched.append(url) or url)
    ahead.want(["a", "b"])
    ahead.close()
    ahead.thread.join(5)
    assert not ahead.thread.is_alive()
    assert fetched in ([], ["a"], ["a", "b"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("fuzz") / "shards", [6])


def tampered(data: st.DataObject, content: bytes) -> bytes:
    """Flips, cuts, repeats and insertions, up to four."""
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "zero"])):
            case "flip":
                content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
            case "cut":
                content = content[:at]
            case "insert":
                content = content[:at] + data.draw(st.binary(min_size=1, max_size=600)) + content[at:]
            case "repeat":
                content = content + content[at:]
            case "zero":
                content = content[:at] + bytes(512) + content[at + 512 :]
    return content


def read_some(folder: Path, cache_dir: Path) -> None:
    """Three batches of the size asked for, or one line for the user: nothing else may happen."""
    given_settings = DataSettings(train=str(folder), cache_dir=str(cache_dir))
    try:
        reader = Reader(
            [open_source(SourceSettings(path=str(folder)), given_settings)], given_settings, preprocess(), 0
        )
        for start in (0, 4, 8):
            rows = Rows(*(np.zeros(shape, dtype) for shape, dtype in Rows.shapes(4, preprocess())))
            reader.fill(np.arange(start, start + 4), rows)
            assert rows.token_mask.any(axis=1).all()
    except UserError as error:
        assert "\n" not in str(error)


fuzz = settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(data=st.data())
def test_tampered_tars_never_crash_an_indexed_reader(data: st.DataObject, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"fuzz{next(numbers)}"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "00000.tar").write_bytes(tampered(data, (original / "00000.tar").read_bytes()))
    read_some(folder, tmp_path / "cache")


@fuzz
@given(data=st.data())
def test_tampered_tars_never_crash_a_scan(data: st.DataObject, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"fuzz{next(numbers)}"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(tampered(data, (original / "00000.tar").read_bytes()))
    read_some(folder, tmp_path / "cache")


@fuzz
@given(data=st.data())
def test_tampered_indexes_never_crash(data: st.DataObject, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"fuzz{next(numbers)}"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = bytearray((original / "00000.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        index[data.draw(st.integers(128, len(index) - 1))] = data.draw(st.integers(0, 255))
    (folder / "00000.idx").write_bytes(index)
    read_some(folder, tmp_path / "cache")


def pairs(folder: Path, count: int) -> dict[int, tuple[torch.Tensor, str]]:
    """Image and caption of every sample, by its number, as our evaluation reads them."""
    examples = open_examples(str(folder), DataSettings())
    assert examples.size == count
    found = {}
    for example in map(examples.read, range(count)):
        with Image.open(io.BytesIO(example.image)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        found[example.metadata["number"]] = (pixels, example.captions[0])
    return found


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = write_shards(tmp_path / "shards", [5, 4])
    ours = pairs(folder, 9)
    theirs = list(webdataset.WebDataset(f"{folder}/{{00000..00001}}.tar", shardshuffle=False).decode("rgb8"))
    assert len(theirs) == len(ours) == 9
    for item in theirs:
        pixels, caption = ours[item["json"]["number"]]
        assert np.array_equal(item["png"], pixels.permute(1, 2, 0).numpy()) and item["txt"] == caption


def test_hugging_face_datasets_reads_the_same_samples(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed: pip install datasets")
    folder = write_shards(tmp_path / "shards", [5, 4])
    ours = pairs(folder, 9)
    theirs = datasets.load_dataset("webdataset", data_files=f"{folder}/*.tar", split="train", streaming=True)
    found = list(theirs)
    assert len(found) == 9
    for item in found:
        pixels, caption = ours[item["json"]["number"]]
        assert np.array_equal(np.asarray(item["png"]), pixels.permute(1, 2, 0).numpy()) and item["txt"] == caption
