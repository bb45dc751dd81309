"""DataCompDR's tars read as they are: synthetic captions, embeddings, and augmentations replayed from their
parameters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps

from data_tools.format.scan import scan_tar
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, mistake, steps
from tests.support.shards import Members, encode, picture, preprocess, write_tar
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer.core import distributed
from trainer.core.types import Batch, UserError
from trainer.data import DataSettings, build_loader
from trainer.data.paug import OPERATIONS, apply, replay
from trainer.data.sharded_dataset import hash_caption
from trainer.data.transforms import Damaged

SIZE, VIEWS, SYNTHETIC, WIDTH, COUNT = (40, 30), 4, 3, 1536, 24
CAPTIONS = ["txt", "syn_text"]


def texts(number: int) -> list[str]:
    return [f"caption {number}", *(f"synthetic {k} of {number}" for k in range(SYNTHETIC))]


def parameters(seed: int) -> list[Any]:
    dice = np.random.default_rng(1000 + seed)
    views: list[Any] = []
    for _ in range(VIEWS):
        height, width = int(dice.integers(5, SIZE[1])), int(dice.integers(5, SIZE[0]))
        top, left = int(dice.integers(0, SIZE[1] - height + 1)), int(dice.integers(0, SIZE[0] - width + 1))
        views.append(
            [[top, left, height, width], [[number := int(dice.integers(14)), 5.0 if number == 10 else 0.27], [9, -0.3]]]
        )
    views[0][1] = None
    return views


def embeddings(number: int) -> dict[str, np.ndarray[Any, Any]]:
    dice = np.random.default_rng(2000 + number)
    return {
        name: dice.normal(size=(rows, WIDTH)).astype(np.float32)
        for name, rows in (("image_emb", VIEWS), ("text_emb", 1 + SYNTHETIC))
    }


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def members(number: int) -> Members:
    """In the order in which `tar -cf *.*` writes them."""
    return {
        "json": json.dumps({"uid": f"{number:032x}"}).encode(),
        "npz": npz(**embeddings(number)),
        "paug.json": json.dumps({"param_aug": parameters(number)}).encode(),
        "png": encode(picture(number, SIZE)),
        "syn.json": json.dumps({"syn_text": texts(number)[1:]}).encode(),
        "txt": texts(number)[0].encode(),
        "url.txt": b"https://nowhere.invalid/image",
    }


def write(folder: Path, changed: dict[int, Members] | None = None) -> Path:
    folder.mkdir()
    for shard in range(2):
        numbers = range(shard * COUNT // 2, (shard + 1) * COUNT // 2)
        write_tar(folder / f"{shard:08d}.tar", {f"{n:032x}": members(n) | (changed or {}).get(n, {}) for n in numbers})
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dr") / "tars")


def batches(
    tars: Path, cache: Path, count: int, rank: int = 0, world: int = 1, stored: str | None = "npz", **settings: Any
) -> tuple[list[Batch], dict[str, int]]:
    data = DataSettings(train=str(tars), **{"workers": 0, "caption": CAPTIONS, "cache_dir": str(cache), **settings})
    with build_loader(data, preprocess(16), 12, rank, world, 5, 0, stored) as loader:
        found = [Batch(*(field.clone() for field in next(loader))) for _ in range(count)]
        return found, dict(loader.skipped.reasons)


def test_every_row_is_a_view_of_its_image_and_a_caption_with_their_embeddings(tars: Path, tmp_path: Path) -> None:
    """The members' places come from the tars once; a second loader reads them from the cache."""
    found, _ = batches(tars, tmp_path / "cache", 8)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "indexes").glob("*.dr")}
    assert len(kept) == 2
    again, _ = batches(tars, tmp_path / "cache", 8)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    seen = set()
    for batch, same in zip(found, again, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(batch, same, strict=True))
        assert batch.taught.dtype == torch.float32
        for row, number in enumerate(batch.ids.tolist()):
            image = np.asarray(picture(number, SIZE))
            views = [replay(image, one, (16, 16)) for one in parameters(number)]
            drawn = [k for k, view in enumerate(views) if torch.equal(view, batch.pixels[row])]
            text = [hash_caption(one) for one in texts(number)].index(int(batch.groups[row]))
            images, words = (torch.from_numpy(embeddings(number)[name]) for name in ("image_emb", "text_emb"))
            assert any(torch.equal(batch.taught[row], torch.cat([images[k], words[text]])) for k in drawn)
            seen |= {("view", k) for k in drawn} | {("text", text)}
    assert len(seen) == VIEWS + 1 + SYNTHETIC


def rank_rows(tars: Path, cache: Path, workers: int, whole: list[list[bytes]]) -> None:
    rank, world = distributed.rank(), distributed.world_size()
    mine, _ = batches(tars, cache, len(whole), rank, world, workers=workers)
    for batch, every in zip(mine, whole, strict=True):
        for field, data in zip(batch, every, strict=True):
            share = len(data) // world
            assert field.numpy().tobytes() == data[rank * share : (rank + 1) * share]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (3, 0)])
def test_rows_are_those_of_any_ranks_and_workers(tars: Path, tmp_path: Path, ranks: int, workers: int) -> None:
    whole, _ = batches(tars, tmp_path / "cache", 3)
    run_ranks(rank_rows, ranks, tars, tmp_path / "cache", workers, [[f.numpy().tobytes() for f in b] for b in whole])


def test_its_captions_are_read_without_its_embeddings(tars: Path, tmp_path: Path) -> None:
    drawn = {
        int(group)
        for batch in batches(tars, tmp_path / "cache", 8, stored=None, caption="syn_text")[0]
        for group in batch.groups
    }
    assert drawn <= {hash_caption(text) for number in range(COUNT) for text in texts(number)[1:]}
    assert len(drawn) > COUNT


def test_a_scan_takes_no_member_for_a_damaged_sample(tars: Path, tmp_path: Path) -> None:
    rows, problems = scan_tar(tars / "00000000.tar")
    assert len(rows) == COUNT // 2 and not problems
    write_tar(tmp_path / "alone.tar", {"a": members(0), "b": {"syn.json": b"{}"}})
    assert [problem.reason for problem in scan_tar(tmp_path / "alone.tar")[1]] == ["missing_image"]


class Opens:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_damaged_members_are_replaced_and_no_pickle_is_read(tmp_path: Path) -> None:
    trap = tmp_path / "unpickled"
    objects = np.array([[Opens(trap)]], dtype=object)
    changed: dict[int, Members] = {
        1: {"npz": npz(image_emb=objects, text_emb=objects)},
        2: {"npz": b"PK\3\4 cut"},
        3: {"npz": npz(image_emb=np.zeros((VIEWS, WIDTH), np.float32))},
        4: {"paug.json": b"{"},
        5: {"paug.json": json.dumps({"param_aug": [[[0, 0, 31, 10], None]] * VIEWS}).encode()},
        6: {"paug.json": json.dumps({"param_aug": [[[0, 0, 9, 9], [[14, 0.0]]]] * VIEWS}).encode()},
        7: {"syn.json": json.dumps({"syn_text": "one"}).encode()},
        10: {"paug.json": json.dumps({"param_aug": [[[0, 0, 9, 9], [[10, 0.3]]]] * VIEWS}).encode()},
        8: {"npz": npz(**{**embeddings(8), "text_emb": embeddings(8)["text_emb"][:0]})},
        9: {"npz": npz(image_emb=np.zeros((VIEWS, 12), np.float32), text_emb=np.zeros((4, 12), np.float32))},
    }
    found, reasons = batches(write(tmp_path / "tars", changed), tmp_path / "cache", 2)
    assert not set(range(1, 11)) & {int(number) for batch in found for number in batch.ids}
    assert not trap.exists()
    text = " | ".join(reasons)
    for part in (
        "its npz cannot be read (Object arrays",
        "its npz cannot be read (File is not a zip",
        "text_emb is not a file",
        "its paug.json is not valid JSON",
        "outside the image",
        "is not of a crop and RandAugment",
        "impossible magnitude (bits must be",
        "its syn.json has no list 'syn_text'",
        "text_emb [0, 1536]",
        "image_emb [4, 12]",
    ):
        assert part in text, text


def test_the_viewers_text_of_parameters_is_read_too(tars: Path, tmp_path: Path) -> None:
    as_text = {n: {"paug.json": json.dumps({"param_aug": json.dumps(parameters(n))}).encode()} for n in range(COUNT)}
    one, other = (batches(path, tmp_path / "c", 2)[0] for path in (tars, write(tmp_path / "tars", as_text)))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "changed", "says"),
    [
        ({"augment": {"flip": 0.5}}, {}, "images are augmented as their paug.json says; remove data.augment"),
        ({"caption": "uid"}, {}, "is of the captions txt and syn_text, not uid"),
        ({"noise": {"text": 0.1}}, {}, "a stored teacher has not seen spoiled pairs"),
        ({}, {"npz": npz(image_emb=np.zeros((4, 12), "f4"), text_emb=np.zeros((4, 12), "f4"))}, "multiple of 768"),
        ({}, {"npz": b""}, "no embeddings in the tars"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, settings: dict[str, Any], changed: Members, says: str
) -> None:
    tars = write(tmp_path / "tars", dict.fromkeys(range(COUNT), changed))
    with pytest.raises(UserError) as raised:
        batches(tars, tmp_path / "cache", 1, **settings)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_learns_from_them(tars: Path, tmp_path: Path) -> None:
    tree = {
        "run": {"samples": 160, "directory": str(tmp_path / "run")},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(tars), "caption": CAPTIONS, "workers": 0, "cache_dir": str(tmp_path / "cache")},
        "batch": {"size": 16, "micro_batch": 4},
        "optim": {"lr": 3e-3},
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000},
        "eval": {"every": 0},
        "distill": {"stored": "npz"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert run_ranks(call, 2, tmp_path / "recipe.yaml") == [0, 0]
    losses = [line["loss"] for line in steps(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    write_tar(tmp_path / "plain.tar", {"a": {"png": encode(picture(0)), "txt": tiny_captions(1)[0].encode()}})
    more = [f"data.train={tmp_path / 'plain.tar'}", "data.caption=txt", f"run.directory={tmp_path / 'other'}"]
    [text] = run_ranks(mistake, 1, tmp_path / "recipe.yaml", *more)
    assert "no embeddings in the tars" in text


def test_operations_are_torchvisions() -> None:
    """Those that pixels can be counted for; all 14 were compared with torchvision 0.29 and differ in no pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def made(name: str, magnitude: float) -> Any:
        return np.asarray(apply(image, name, magnitude))

    right = np.zeros_like(pixels)
    right[:, 3:] = pixels[:, :-3]
    assert np.array_equal(made("TranslateX", 3.9), right)
    down = np.zeros_like(pixels)
    down[:-2] = pixels[2:]
    assert np.array_equal(made("TranslateY", -2.0), down)
    sheared = np.zeros_like(pixels)
    for y in range(12):
        for x in range(10):
            if 0 <= (source := int(np.floor(x + 0.5 + 0.5 * (y + 0.5)))) < 10:
                sheared[y, x] = pixels[y, source]
    assert np.array_equal(made("ShearX", 0.5), sheared)
    assert np.array_equal(made("ShearY", 0.5), np.asarray(apply(image.transpose(4 + 1), "ShearX", 0.5).transpose(5)))
    assert np.array_equal(made("Solarize", 179.2), np.where(pixels < 179.2, pixels, 255 - pixels))
    assert np.array_equal(made("Posterize", 5.0), pixels & 0b11111000)
    assert np.array_equal(made("Equalize", 0), np.asarray(ImageOps.equalize(image)))
    assert np.array_equal(made("Identity", 0), pixels)
    assert OPERATIONS.index("Equalize") == 13 and OPERATIONS.index("Rotate") == 5


def test_parameters_of_another_form_are_damage() -> None:
    for wrong in (None, 3, [], [[0, 0, 4, 4]], [[0, 0, 4], None], [["a", 0, 4, 4], None], [[0, 0, 0, 4], None]):
        with pytest.raises(Damaged):
            replay(np.zeros((8, 8, 3), np.uint8), wrong, (4, 4))
