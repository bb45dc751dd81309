"""Spoiled pairs: the same ones whoever reads them and wherever a run was interrupted, in the share asked for, and
none without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_tools.io.permutation import Ints
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, curve, make_shards, steps, stopped_at_step
from tests.support.shards import (
    NUM_TOKENS,
    global_batches,
    loader,
    overwrite,
    picture,
    preprocess,
    same,
    take,
    tokenize,
    write_shards,
)
from tests.support.tiny_models import PRETRAINED, tiny_captions, tiny_config, tiny_pretrained, tiny_tokenizer
from trainer.core.types import Batch, PrecomputedTower, Preprocess, UserError
from trainer.data.noise import Noise
from trainer.data.patches import grid_size, pack
from trainer.data.settings import NoiseSettings
from trainer.data.sharded_dataset import hash_caption

ALL = {"image": 0.4, "text": 0.3, "pairing": 0.5}
BATCH, STEPS = 12, 4


class Words:
    """The shards' tokenizer, with noise."""

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return tokenize(captions)

    def noise(self, draws: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = 1 + (draws[:, :1] * NUM_TOKENS).astype(np.int64)
        tokens = np.where(np.arange(NUM_TOKENS) < lengths, 30_001 + (draws[:, 1:] * 100).astype(np.int64), 0)
        return torch.from_numpy(tokens), torch.from_numpy(tokens > 0)


def prep(resize: Any = "squash", precomputed: PrecomputedTower | None = None) -> Preprocess:
    size = (8, 8) if resize != "patches" else (4, (6 + 1) * 4)
    return Preprocess(size, resize, "bicubic", (0.5,) * 3, (0.5,) * 3, NUM_TOKENS, Words(), precomputed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 samples in three shards, and a copy with damage in it."""
    root = tmp_path_factory.mktemp("shards")
    for name in ("whole", "damaged"):
        write_shards(root / name, [15, 15, 7], captions=2)
    for shard, row in ((0, 3), (1, 7), (2, 0)):
        overwrite(root / "damaged", shard, row)
    return root


@pytest.mark.parametrize("name", ["whole", "damaged"])
def test_ranks_workers_and_cache_do_not_change_what_is_spoiled(shards: Path, name: str) -> None:
    asked = {"prep": prep(), "noise": ALL, "cache_decoded": 0}
    reference = global_batches(shards / name, STEPS, world=1, **asked)
    for world in (1, 2, 4):
        for workers in (0, 3):
            assert same(global_batches(shards / name, STEPS, world, workers=workers, **asked), reference)
    assert same(global_batches(shards / name, STEPS, world=2, **asked | {"cache_decoded": 1}), reference)


@pytest.mark.parametrize("seen", [24, 36, 324])
def test_a_run_resumes_in_the_middle_of_an_epoch(shards: Path, seen: int) -> None:
    asked = {"prep": prep(), "noise": ALL, "cache_decoded": 0}
    whole = global_batches(shards / "whole", seen // BATCH + 2, world=1, **asked)
    for world, workers in ((1, 0), (4, 2)):
        assert same(global_batches(shards / "whole", 2, world, seen=seen, workers=workers, **asked), whole[-2:])


def test_without_noise_every_batch_is_as_if_there_were_no_key(shards: Path) -> None:
    zero = {"image": 0, "text": 0, "pairing": 0}
    for cached in (0, 1):
        plain = take(loader(shards / "whole", cache_decoded=cached), STEPS)
        assert same(take(loader(shards / "whole", cache_decoded=cached, noise=zero), STEPS), plain)


def copy(batch: Batch) -> Batch:
    """One that does not keep the loader's buffer."""
    return Batch(*(field.clone() for field in batch))


def spoiled(clean: list[Batch], noisy: list[Batch]) -> dict[str, Ints]:
    """[batch] what differs of each batch's images, captions that are random, and captions of other pairs."""
    pairs = list(zip(clean, noisy, strict=True))
    random = [(b.tokens > 30_000).any(1) for _, b in pairs]
    moved = [(a.groups != b.groups) & ~c for (a, b), c in zip(pairs, random, strict=True)]
    pictures = [(a.pixels != b.pixels).flatten(1).any(1) for a, b in pairs]
    return {
        "image": np.array([int(x.sum()) for x in pictures]),
        "text": np.array([int(x.sum()) for x in random]),
        "pairing": np.array([int(x.sum()) for x in moved]),
    }


@pytest.mark.parametrize(("kind", "share"), [("image", 0.25), ("text", 0.25), ("pairing", 0.25), ("pairing", 0.03)])
def test_the_share_is_what_was_asked_for_and_what_the_loader_counts(shards: Path, kind: str, share: float) -> None:
    asked = {"prep": prep(), "batch": 37}
    with loader(shards / "whole", **asked) as source:
        clean = [copy(next(source)) for _ in range(80)]
    with loader(shards / "whole", noise={kind: share}, **asked) as source:
        noisy, counted = [], []
        for _ in range(80):
            noisy.append(copy(next(source)))
            counted.append(source.noise_counts())
    found = spoiled(clean, noisy)
    assert found[kind].tolist() == [counts[kind] for counts in counted]
    assert not any(found[other].any() for other in ALL if other != kind)
    count = 80 * 37
    assert abs(found[kind].sum() / count - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_captions_change_places_within_the_global_batch(shards: Path) -> None:
    asked = {"prep": prep(), "batch": 20}
    clean = take(loader(shards / "whole", **asked), 6)
    noisy = take(loader(shards / "whole", noise={"pairing": 1}, **asked), 6)
    for before, after in zip(clean, noisy, strict=True):
        assert sorted(before.groups.tolist()) == sorted(after.groups.tolist())
        assert torch.equal(before.pixels, after.pixels) and torch.equal(before.ids, after.ids)
    assert all((a.groups != b.groups).all() for a, b in zip(clean[:1], noisy[:1], strict=True))
    for row in range(20):
        (origin,) = (clean[0].groups == noisy[0].groups[row]).nonzero().flatten().tolist()
        assert torch.equal(clean[0].tokens[origin], noisy[0].tokens[row])


def test_random_captions_have_groups_of_their_own_and_differ(shards: Path) -> None:
    asked = {"prep": prep(), "batch": 37, "noise": {"text": 1}}
    batches = take(loader(shards / "whole", **asked), 3)
    groups = torch.cat([batch.groups for batch in batches])
    assert len(set(groups.tolist())) == 3 * 37
    assert not set(groups.tolist()) & {hash_caption(f"caption {number}") for number in range(37)}
    lengths = torch.cat([batch.token_mask.sum(1) for batch in batches])
    assert set(lengths.tolist()) == set(range(1, NUM_TOKENS + 1))


def test_noise_of_a_picture_is_uniform_and_new_every_time() -> None:
    noise = Noise(NoiseSettings(image=1), prep(), seed=3, batch_size=8, start=0)
    first, second = (noise.image(position, np.zeros((3, 64, 64), np.uint8)) for position in (5, 6))
    counts = np.bincount(first.ravel(), minlength=256)
    assert ((counts - 48) ** 2 / 48).sum() < 350, "chi-squared of 255 degrees of freedom"
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.04
    assert np.array_equal(first, noise.image(5, np.ones((3, 64, 64), np.uint8)))


def test_a_strip_of_patches_keeps_its_grid() -> None:
    noise = Noise(NoiseSettings(image=1), prep("patches"), seed=3, batch_size=8, start=0)
    strip = pack(torch.full((3, 8, 4), 200, dtype=torch.uint8), 4, 6).numpy()  # two patches of six
    made = noise.image(0, strip)
    assert grid_size(made, 4, 6) == (2, 1)
    assert not made[:, :, 2 * 4 : 6 * 4].any() and len(np.unique(made[:, :, : 2 * 4])) > 40


@pytest.mark.parametrize("kind", PRETRAINED)
def test_random_captions_look_like_the_models_own(kind: str, tmp_path: Path) -> None:
    tokenize = tiny_pretrained(kind, tmp_path).preprocess.tokenize
    draws = np.random.default_rng(0).random((300, 1 + tokenize.num_tokens))
    tokens, mask = tokenize.noise(draws)
    own, own_mask = tokenize(["a"])
    special = torch.tensor(tokenize.tokenizer.all_special_ids)
    assert tokens.shape == mask.shape == (300, tokenize.num_tokens)
    frame = [token for token in own[0][own_mask[0]].tolist() if token in special]
    for row, real in zip(tokens, mask, strict=True):
        assert [token for token in row[real].tolist() if token in special] == frame
        assert real.tolist() == sorted(real.tolist(), reverse=True)
        assert set(row[~real].tolist()) <= {tokenize.tokenizer.pad_token_id}
    assert set(mask.sum(1).tolist()) == set(range(1 + len(frame), tokenize.num_tokens + 1))
    words = set(range(len(tokenize.tokenizer))) - set(special.tolist())
    assert set(tokens[mask].tolist()) - set(special.tolist()) == words


def test_what_cannot_be_spoiled_is_said() -> None:
    for side in ("image", "text"):
        stored = prep(precomputed=PrecomputedTower(side, "column", "0", 4))
        with pytest.raises(UserError, match=rf"data\.noise\.{side}.*embeddings are stored"):
            Noise(NoiseSettings(**{side: 0.1}), stored, 0, 8, 0)
    with pytest.raises(UserError, match=r"data\.noise\.text: this model's tokenizer"):
        Noise(NoiseSettings(text=0.1), preprocess(), 0, 8, 0)


def test_a_run_logs_its_noise_and_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "pairs", tiny_captions(80))
    tree: dict[str, Any] = {
        "run": {"directory": str(tmp_path / "run"), "samples": 96},
        "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
        "data": {"train": str(shards), "workers": 0, "noise": ALL},
        "batch": {"size": 16, "micro_batch": 4},
        "engine": {"precision": "fp32"},
        "log": {"every": 1, "line_seconds": 1000, "trackers": "none"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    run_ranks(call, 1, recipe, f"run.directory={tmp_path / 'whole'}")
    run_ranks(stopped_at_step, 2, 3, recipe)
    run_ranks(call, 2, recipe)
    found, expected = curve(tmp_path / "run"), curve(tmp_path / "whole")
    np.testing.assert_allclose([point[1] for point in found], [point[1] for point in expected], rtol=2e-4)
    counts = [line["noise"] for line in steps(tmp_path / "run")]
    assert counts == [line["noise"] for line in steps(tmp_path / "whole")]
    assert len(counts) == 6 and all(one["pairing"] == 8 for one in counts) and len({one["image"] for one in counts}) > 1


def test_pictures_are_the_shards_own_where_no_noise_falls(shards: Path) -> None:
    batch = take(loader(shards / "whole", prep=prep(), batch=37, noise={"image": 0.5}), 1)[0]
    own = [
        bool(np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture(number))))
        for pixels, number in zip(batch.pixels, batch.ids.tolist(), strict=True)
    ]
    assert 5 < sum(own) < 32
