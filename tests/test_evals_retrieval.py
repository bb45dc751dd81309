"""Retrieval against a dense float64 reference that enumerates orders; ties, several captions, ranks, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.support.forked_ranks import run_ranks
from trainer.evals.ranking import Standing
from trainer.evals.retrieval import best, recalls, standings
from trainer.evals.upper_bound import naming_ceiling, retrieval_ceiling


def pairs(n: int, m: int, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of n images and m captions that are alike by half, every image with a caption."""
    draw = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=draw)])[torch.randperm(m, generator=draw)]
    image = torch.randn(n, d, generator=draw)
    text = image[owner] + 1.5 * torch.randn(m, d, generator=draw)
    return normalize(image, dim=-1), normalize(text, dim=-1), owner


def dense(scores: Tensor, right: Tensor, k: int) -> float:
    """Recall at k from a whole float64 score matrix without ties."""
    first = scores.argsort(dim=1, descending=True)[:, :k]
    return right.gather(1, first).any(1).double().mean().item()


@pytest.mark.parametrize(("n", "m", "tile"), [(1, 1, 4), (7, 7, 3), (50, 50, 64), (40, 200, 33), (129, 300, 64)])
def test_equals_the_dense_reference(n: int, m: int, tile: int) -> None:
    image, text, owner = pairs(n, m)
    found = recalls(*standings(image, text, owner, tile=tile))
    scores = image.double() @ text.double().T
    mine = owner[None, :] == torch.arange(n)[:, None]
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx(dense(scores, mine, k), abs=1e-12)
        assert found[f"text_to_image_r{k}"] == pytest.approx(dense(scores.T, mine.T, k), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("better", "level", "right"), [(0, 0, 1), (0, 1, 1), (1, 2, 1), (0, 3, 2), (2, 2, 2), (4, 1, 1), (0, 5, 1)]
)
def test_a_tie_counts_as_the_share_of_orders_it_wins(better: int, level: int, right: int, k: int) -> None:
    orders = list(itertools.permutations([False] * level + [True] * right))
    wins = sum(any(([False] * better + list(order))[:k]) for order in orders) / len(orders)
    standing = Standing(*(torch.tensor([value]) for value in (better, level, right)))
    assert standing.recall(k) == pytest.approx(wins, abs=1e-12)


def test_a_collapsed_model_gets_chance() -> None:
    image = normalize(torch.ones(40, 8), dim=-1)
    found = recalls(*standings(image, image, torch.arange(40), tile=16))
    assert found["image_to_text_r1"] == pytest.approx(1 / 40)
    assert found["text_to_image_r10"] == pytest.approx(10 / 40)


def test_copies_share_what_one_would_win_wherever_they_stand() -> None:
    image, _, _ = pairs(61, 61, d=768)
    image[57] = image[3]
    for tile in (8, 61, 64):
        found = recalls(*standings(image, image.clone(), torch.arange(61), tile=tile))
        assert found["image_to_text_r1"] == pytest.approx(60 / 61, abs=1e-12)
        assert found["text_to_image_r1"] == pytest.approx(60 / 61, abs=1e-12)
        assert found["image_to_text_r5"] == 1.0


def test_the_best_of_several_captions_counts() -> None:
    image = torch.eye(3)
    text = torch.stack([image[1], image[0], image[1], image[2]])  # image 0 owns a wrong caption and a right one
    found = recalls(*standings(image, text, torch.tensor([0, 0, 1, 2])))
    assert found["image_to_text_r1"] == pytest.approx((1 + 0.5 + 1) / 3)  # image 1 ties with the wrong caption of 0
    assert found["text_to_image_r1"] == pytest.approx(3 / 4)


def test_what_is_not_a_number_never_wins() -> None:
    image, text, owner = pairs(20, 20)
    sane = recalls(*standings(image, text, owner))
    broken = recalls(*standings(torch.full_like(image, torch.nan), text, owner))
    assert broken == dict.fromkeys(sane, 0.0)


def test_a_picture_without_a_caption_is_an_error() -> None:
    with pytest.raises(ValueError, match="image 2 has no caption"):
        standings(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 1]))


def _share(image: Tensor, text: Tensor, owner: Tensor) -> dict[str, float]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return recalls(*standings(image, text, owner, tile=16, rank=rank, world=world))


@pytest.mark.parametrize(("world", "n"), [(2, 33), (3, 2)])
def test_ranks_share_the_work_and_agree(world: int, n: int) -> None:
    image, text, owner = pairs(n, 70)
    alone = recalls(*standings(image, text, owner))
    assert run_ranks(_share, world, image, text, owner) == [alone] * world


def test_no_matrix_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.evals.retrieval as module

    largest = 0
    plain = module.similarity

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, a.shape[0] * b.shape[0])
        return plain(a, b)

    monkeypatch.setattr(module, "similarity", watched)
    image, text, owner = pairs(300, 900)
    standings(image, text, owner, tile=32)
    best(image, text, 5, tile=32)
    assert largest <= 300 * 32  # `best` takes a tile of answers for all queries, `standings` 32 x 32


def test_best_answers_come_in_order() -> None:
    image, text, _ = pairs(9, 50)
    scores, places = best(image, text, 5, tile=7)
    wanted = (image.double() @ text.double().T).sort(dim=1, descending=True)
    assert torch.equal(places, wanted.indices[:, :5])
    assert torch.allclose(scores.double(), wanted.values[:, :5])
    assert best(image, text[:3], 5)[1].shape == (9, 3)


def test_ceiling_of_identical_pictures_and_captions() -> None:
    assert retrieval_ceiling("abc", "xyz", [0, 1, 2]) == {
        "image_to_text_r1_ceiling": 1.0,
        "text_to_image_r1_ceiling": 1.0,
    }
    # Images 0 and 1 are the same, with captions of their own: one of two is won either way.
    assert retrieval_ceiling("aab", "xyz", [0, 1, 2]) == {
        "image_to_text_r1_ceiling": 2 / 3,
        "text_to_image_r1_ceiling": 2 / 3,
    }
    # The same caption for two pictures: either copy of it may come first.
    assert retrieval_ceiling("abc", "xxz", [0, 1, 2]) == {
        "image_to_text_r1_ceiling": 2 / 3,
        "text_to_image_r1_ceiling": 2 / 3,
    }
    # A second caption that is its own lifts image 0, not its shared caption.
    found = retrieval_ceiling("abc", "xxzw", [0, 1, 2, 0])
    assert found == {"image_to_text_r1_ceiling": pytest.approx(2.5 / 3), "text_to_image_r1_ceiling": 3 / 4}


@pytest.mark.parametrize("seed", range(5))
def test_no_function_beats_the_ceiling_and_an_oracle_reaches_it(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(6, (12,), generator=draw)
    ceiling = retrieval_ceiling(kinds.tolist(), list(range(12)), list(range(12)))
    look = torch.eye(6)[kinds]  # embeds what is to be seen, captions as their picture: all that can be known
    found = recalls(*standings(look, look.clone(), torch.arange(12)))
    assert found["image_to_text_r1"] == pytest.approx(ceiling["image_to_text_r1_ceiling"])
    assert found["text_to_image_r1"] == pytest.approx(ceiling["text_to_image_r1_ceiling"])


def test_ceiling_of_naming() -> None:
    assert naming_ceiling("aab", ["sans", "mono", "mono"]) == 2 / 3
    assert naming_ceiling("ab", ["sans", "mono"]) == 1.0
