"""Zero-shot classification and its prompts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from trainer.core.types import UserError
from trainer.evals.prompts import TEMPLATES, context_fields, prompts, read_templates
from trainer.evals.zeroshot import accuracies, classify, ensemble, per_class


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).bool()


@pytest.mark.parametrize("own", [False, True], ids=["shared classes", "classes of each image"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_equals_the_dense_reference(own: bool, rows: int) -> None:
    image, prompt = unit(50, 12), unit(*((50, 9, 4, 12) if own else (9, 4, 12)), seed=1)
    labels = torch.randint(9, (50,), generator=torch.Generator().manual_seed(2))
    classes = ensemble(prompt)
    found = accuracies(classify(image, classes, one_hot(labels, 9), rows=rows))
    mean = prompt.double().mean(-2)
    scores = (image.double()[:, None] * (mean / mean.norm(dim=-1, keepdim=True))).sum(-1)
    order = scores.argsort(1, descending=True)
    assert found["top1"] == pytest.approx((order[:, 0] == labels).double().mean().item())
    assert found["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean().item())


def test_any_true_name_counts_and_ties_do_not_win() -> None:
    image, classes = torch.eye(3)[:2], torch.eye(3)
    right = torch.tensor([[False, True, True], [False, True, False]])
    standing = classify(image, classes, right)
    assert standing.hits(1).tolist() == [0.0, 1.0]
    assert standing.right.tolist() == [2, 1]
    tied = classify(torch.ones(1, 3), torch.ones(4, 3), torch.tensor([[True, False, False, False]]))
    assert tied.recall(1) == 0.25
    assert classify(torch.full((1, 3), torch.nan), classes, torch.tensor([[True, False, False]])).recall(1) == 0.0


def test_per_class_leaves_out_classes_without_pictures() -> None:
    labels = torch.tensor([0, 0, 2])
    standing = classify(torch.eye(3)[[0, 1, 2]], torch.eye(3), one_hot(labels, 3))
    assert per_class(standing, labels, ["a", "b", "c"]) == {"a": 0.5, "c": 1.0}


def test_standard_sets() -> None:
    assert {name: len(set(templates)) for name, templates in TEMPLATES.items()} == {
        "name": 1,
        "photo": 1,
        "openai_imagenet": 80,
        "openai_imagenet_7": 7,
        "openai_cifar": 18,
    }
    # Of the sorted list in openai/CLIP's notebook.
    digest = hashlib.sha256("\n".join(sorted(TEMPLATES["openai_imagenet"])).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"
    assert set(TEMPLATES["openai_imagenet_7"]) <= set(TEMPLATES["openai_imagenet"])
    assert all(read_templates([name]) for name in TEMPLATES)


def test_templates_use_the_class_and_the_metadata() -> None:
    templates = ["{}", "{c}!", "{character}, {face}", "{{}} {}"]
    assert context_fields(templates, "face") == ["character"]
    filled = prompts(templates, "bold serif", "face", {"character": "digit one", "face": "never read"})
    assert filled == ["bold serif", "bold serif!", "digit one, bold serif", "{} bold serif"]
    assert context_fields(["{}", "a photo of a {c}."], "face") == []


def test_a_class_name_with_braces_is_left_alone() -> None:
    assert prompts(["{}"], "{set}", "face", {}) == ["{set}"]


def test_templates_come_from_files(tmp_path: Path) -> None:
    file = tmp_path / "zeroshot_classification_templates.txt"
    file.write_text("a photo of a {c}.\n\n{c}\n", encoding="utf-8")
    assert read_templates([str(file), "the {}"]) == ["a photo of a {c}.", "{c}", "the {}"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["openai_imagnet"], "one of the sets name, photo"),
        (["{"], "is not a template"),
        (["{a.b}"], "a place is written"),
        (["{} {}"], "a place is written"),
        (["{{}}"], "has no place for the class name"),
        ([], "the list is empty"),
    ],
)
def test_bad_templates_are_one_clear_line(spec: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_templates(spec)
    assert "\n" not in str(caught.value)
