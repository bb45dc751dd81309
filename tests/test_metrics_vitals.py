"""What a step says of the model, against the same in plain float64, and on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests import test_train
from tests.support.forked_ranks import run_ranks
from tests.support.runs import PLAIN, call, curve, steps
from trainer.core.distributed import rank, world_size
from trainer.core.types import Embeddings
from trainer.metrics import vitals
from trainer.metrics.vitals import measure, rows_per_rank, sample_of

shards, recipe = test_train.shards, test_train.recipe
ROWS = 24


def embeddings(seed: int = 0, noise: float = 0.6) -> Embeddings:
    dice = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(ROWS, 10, generator=dice) + 0.5, dim=1)
    text = normalize(image + noise * torch.randn(ROWS, 10, generator=dice), dim=1)
    return Embeddings(image, text, torch.tensor([7.0]), torch.tensor([-3.0]))


GROUPS = torch.tensor([*range(ROWS - 3), 0, 0, 5])


def plainly(z: Embeddings, groups: torch.Tensor) -> dict[str, float]:
    """Pair by pair."""
    image, text = z.image.double().numpy(), z.text.double().numpy()
    n = len(image)
    cosine = image @ text.T
    pairs = [(i, j) for i in range(n) for j in range(n) if groups[i] != groups[j]]
    matched, other = np.diag(cosine), np.array([cosine[pair] for pair in pairs])
    first = [all(cosine[i, i] > cosine[i, j] for k, j in pairs if k == i) for i in range(n)]
    back = [all(cosine[j, j] > cosine[i, j] for i, k in pairs if k == j) for j in range(n)]
    found = {
        "logit_matched": 7 * matched.mean() - 3,
        "logit_matched_std": 7 * matched.std(),
        "logit_other": 7 * other.mean() - 3,
        "logit_other_std": 7 * other.std(),
        "image_to_text_r1": np.mean(first),
        "text_to_image_r1": np.mean(back),
        "cosine_other": other.mean(),
        "repeated": np.mean([(groups == group).sum() > 1 for group in groups]),
    }
    for name, x in (("images", image), ("texts", text)):
        found[f"cosine_{name}"] = np.mean([x[i] @ x[j] for i in range(n) for j in range(n) if i != j])
        eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
        found[f"dims_{name}"] = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    return {name: float(value) for name, value in found.items()}


def local(z: Embeddings, groups: torch.Tensor) -> dict[str, float]:
    rows = ROWS // world_size()
    mine = slice(rank() * rows, (rank() + 1) * rows)
    return measure(Embeddings(z.image[mine], z.text[mine], z.scale, z.bias), groups[mine])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_it_is_what_pair_by_pair_gives_on_any_number_of_ranks(world: int) -> None:
    z = embeddings()
    expected = plainly(z, GROUPS)
    assert 0.2 < expected["image_to_text_r1"] < 0.95 and expected["repeated"] == 5 / ROWS
    for found in run_ranks(local, world, z, GROUPS):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=2e-4), name


def test_a_sample_of_each_rank_is_looked_at_and_all_captions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "SAMPLE", 8)
    z = sample_of(embeddings(), rows_per_rank(1))
    assert len(z.image) == 8
    found = measure(z, GROUPS)
    assert found == {**measure(z, GROUPS[:8]), "repeated": found["repeated"]}
    assert found["repeated"] == pytest.approx(5 / ROWS, rel=1e-4)


def test_a_collapsed_model_retrieves_nothing() -> None:
    one = normalize(torch.ones(ROWS, 10), dim=1)
    found = measure(Embeddings(one, one, torch.tensor([7.0]), torch.tensor([-3.0])), torch.arange(ROWS))
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 0
    assert found["cosine_images"] == found["cosine_texts"] == pytest.approx(1)
    assert found["dims_images"] == pytest.approx(0, abs=1e-6) and found["repeated"] == 0


def test_equal_captions_alone_leave_no_hole() -> None:
    found = measure(embeddings(), torch.zeros(ROWS, dtype=torch.int64))
    assert found["repeated"] == 1 and all(map(math.isfinite, found.values()))
    assert found | {"repeated": 0.0} == measure(embeddings(), torch.arange(ROWS))
    assert measure(sample_of(embeddings(), 1), GROUPS[:1]) == {}


def test_a_run_says_the_same_on_any_number_of_ranks_and_learns_the_same_as_one_that_says_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    options = [*PLAIN, "optim.eps=1e-4", "log.trackers=none", "run.samples=64"]
    logs: dict[str, list[dict[str, Any]]] = {}
    for name, world, more in (("one", 1, ["batch.micro_batch=16"]), ("two", 2, []), ("rare", 2, ["log.every=4"])):
        assert run_ranks(call, world, recipe, *options, *more, f"run.directory={tmp_path / name}") == [0] * world
        logs[name] = steps(tmp_path / name)
    for one, two in zip(logs["one"], logs["two"], strict=True):
        assert one["vitals"].keys() == two["vitals"].keys() and len(one["vitals"]) == 14
        for key, value in one["vitals"].items():
            assert two["vitals"][key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    assert curve(tmp_path / "rare") == curve(tmp_path / "two")[3:]
    first = logs["one"][0]["vitals"]
    assert first["logit_matched"] == pytest.approx(first["logit_other"], abs=1)
    assert json.dumps(logs["one"][0]).count("NaN") == 0
